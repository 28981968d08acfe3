"""On-screen text: a bitmap font of capital letters, 5 x 7 dots."""

from functools import lru_cache

import numpy as np

_ROWS = {  # seven rows of five bits, from the top
    "A": "0e 11 11 1f 11 11 11",
    "B": "1e 11 11 1e 11 11 1e",
    "C": "0e 11 10 10 10 11 0e",
    "D": "1e 11 11 11 11 11 1e",
    "E": "1f 10 10 1e 10 10 1f",
    "F": "1f 10 10 1e 10 10 10",
    "G": "0e 11 10 17 11 11 0e",
    "H": "11 11 11 1f 11 11 11",
    "I": "0e 04 04 04 04 04 0e",
    "J": "07 02 02 02 02 12 0c",
    "K": "11 12 14 18 14 12 11",
    "L": "10 10 10 10 10 10 1f",
    "M": "11 1b 15 15 11 11 11",
    "N": "11 19 15 13 11 11 11",
    "O": "0e 11 11 11 11 11 0e",
    "P": "1e 11 11 1e 10 10 10",
    "Q": "0e 11 11 11 15 12 0d",
    "R": "1e 11 11 1e 14 12 11",
    "S": "0f 10 10 0e 01 01 1e",
    "T": "1f 04 04 04 04 04 04",
    "U": "11 11 11 11 11 11 0e",
    "V": "11 11 11 11 11 0a 04",
    "W": "11 11 11 15 15 1b 11",
    "X": "11 11 0a 04 0a 11 11",
    "Y": "11 11 0a 04 04 04 04",
    "Z": "1f 01 02 04 08 10 1f",
}


@lru_cache(maxsize=64)
def bitmap(word: str) -> np.ndarray:
    """The bitmap of a word in capital letters, bool [7, 6 * letters - 1]."""
    glyphs = []
    for letter in word:
        rows = [int(row, 16) for row in _ROWS[letter].split()]
        glyphs.append([[row >> (4 - k) & 1 for k in range(5)] + [0] for row in rows])
    return np.concatenate(glyphs, axis=1)[:, :-1].astype(bool)


def draw_text(frame: np.ndarray, word: str, y: float) -> None:
    """Draw a word in white on a black background into the frame [H, W, 3], in place.

    The word is centered horizontally, at height `y` (share of the frame), and scaled to at most 0.13 of the frame's
    height and 0.9 of its width.
    """
    height, width = frame.shape[:2]
    dots = bitmap(word)
    scale = max(1, min(int(0.13 * height / dots.shape[0]), int(0.9 * width / dots.shape[1])))
    dots = dots.repeat(scale, 0).repeat(scale, 1)
    top, left = round(y * height - dots.shape[0] / 2), (width - dots.shape[1]) // 2
    margin = scale
    frame[max(top - margin, 0) : top + dots.shape[0] + margin, left - margin : left + dots.shape[1] + margin] = 12
    frame[top : top + dots.shape[0], left : left + dots.shape[1]][dots] = 255

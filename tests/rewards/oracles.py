"""Reference implementations of the rewards in plain Python."""

import re
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein


class Line(NamedTuple):
    """A line of dialogue for the alignment."""

    text: str
    speaker: object


def normalize(text: str) -> str:
    """Word characters in lower case, code point by code point."""
    return "".join("σ" if one == "ς" else one.lower()[0] for one in re.sub(r"[^\w]", "", text)).replace("ς", "σ")


def similarity(a: str, b: str) -> float:
    """1 - edit distance / the longer length."""
    return 1 - Levenshtein.distance(a, b) / max(len(a), len(b))


def dialogue(stated: list[Line], truth: list[Line], threshold: float = 0.6) -> tuple[float, int, float]:
    """Summed similarity and speaker agreement of the best alignment, and R_D, by dynamic programming."""
    stated = [line for line in (Line(normalize(text), who) for text, who in stated) if line.text]
    truth = [line for line in (Line(normalize(text), who) for text, who in truth) if line.text]
    if not stated or not truth:
        return 0.0, 0, float(not stated and not truth)
    best = [[(0.0, 0)] * (len(truth) + 1) for _ in range(len(stated) + 1)]
    for i, line in enumerate(stated, 1):
        for j, other in enumerate(truth, 1):
            options = [best[i - 1][j], best[i][j - 1]]
            alike = similarity(line.text, other.text)
            if alike >= threshold:
                content, speakers = best[i - 1][j - 1]
                options.append((content + alike, speakers + (line.speaker == other.speaker)))
            most = max(content for content, _ in options)
            best[i][j] = max(
                (option for option in options if option[0] >= most - 1e-6), key=lambda one: (one[1], one[0])
            )
    content, speakers = best[-1][-1]
    score = (content + speakers) / 2
    recall, precision = score / len(truth), score / len(stated)
    return content, speakers, 2 * recall * precision / (recall + precision) if score else 0.0


def length(tokens: int, low: int = 2048, high: int = 4096) -> float:
    """R_L."""
    if tokens < low:
        return 1.0
    return 0.0 if tokens >= high else 1 - (tokens - low) / (high - low)


def collapses(text: str, min_span: int = 24, long_units: bool = False) -> bool:
    """RepCol by regular expressions: a unit of 1-49 characters at least five times, or of 50-99 at least four times.

    With `long_units` also one of 100-400 three times or more.
    """
    for unit in range(1, 401 if long_units else 100):
        times = 5 if unit < 50 else 4 if unit < 100 else 3
        for found in re.finditer(rf"(?=((.{{{unit}}})\2{{{times - 1},}}))", text, re.DOTALL):
            stretch, piece = found[1], found[2]
            extra = 0  # the start of one more unit belongs to the stretch
            while text[found.start() + len(stretch) + extra :][:1] == piece[extra : extra + 1] != "":
                extra += 1
            if len(stretch) + extra >= min_span:
                return True
    return False

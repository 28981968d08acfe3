"""Dlg.F1: the dialogue of captions against that of reference captions, by the reward R_D, with no judge."""

from collections.abc import Sequence

import jax
import numpy as np

from avocado_jax.rewards.dialogue import Dialogue, dialogue_references, dialogue_reward
from avocado_jax.rewards.text import Caption, Limits, read_texts
from avocado_jax.rewards.vocabulary import MARKS, make_table, word_weights, words_of
from avocado_jax.typing import Array, Float

BATCH = 32  # captions at once
LETTERS = 512  # distinct characters of a clip's lines
LINE = 400  # characters of a quoted line that are compared
QUOTES = 64  # lines of a caption


def dialogue_scores(captions: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
    """R_D of each caption against the lines that its reference caption quotes; None where that quotes none."""
    scores: list[float | None] = [None] * len(captions)
    asked = [number for number, text in enumerate(references) if text and any(mark in text for mark in MARKS)]
    if not asked:
        return scores
    table = make_table(None, word_weights([references[number] for number in asked]))
    limits = _fitting([text for number in asked for text in (references[number], captions[number])])
    for first in range(0, len(asked), BATCH):
        part = asked[first : first + BATCH]
        full = [*part, *part[-1:] * (BATCH - len(part))]  # one shape, so that one program reads all texts
        made, _ = dialogue_references(table, [None] * BATCH, [references[n] for n in full], limits, LETTERS)
        found = _rewards(read_texts(table, [captions[n] for n in full], limits), made)
        for number, score, lines in zip(part, np.asarray(found), made.count):
            scores[number] = float(score) if lines > 0 else None
    return scores


@jax.jit
def _rewards(captions: Caption, references: Dialogue) -> Float[Array, "B"]:
    return jax.vmap(lambda caption, reference: dialogue_reward(caption, reference))(captions, references)


def _fitting(texts: Sequence[str]) -> Limits:
    """Limits that the texts stay within, of few sizes; quotes beyond QUOTES and long lines aside."""

    def rounded(number: int) -> int:
        return 1 << (max(number, 1) - 1).bit_length()

    marks = max(sum(text.count(mark) for mark in MARKS) for text in texts)
    words = max(len(words_of(text)) for text in texts)
    return Limits(
        rounded(max(256, *map(len, texts))), rounded(max(64, words)), min(rounded(max(8, marks // 2 + 1)), QUOTES), LINE
    )

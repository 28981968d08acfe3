"""Dlg.F1: the dialogue of captions against that of reference captions, by the reward R_D, with no judge."""

import math
from collections.abc import Sequence

from avocado_jax.eval.rewarded import scores
from avocado_jax.rewards.vocabulary import make_table, word_weights


def dialogue_scores(captions: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
    """R_D of each caption against the lines in its reference caption; None where that has no lines."""
    found: list[float | None] = [None] * len(captions)
    scored = [number for number, text in enumerate(references) if text]
    if not scored:
        return found
    texts = [references[number] for number in scored]
    table = make_table(None, word_weights(texts))
    known = [{"caption": text} for text in texts]
    for one in scores(table, [captions[number] for number in scored], known, [math.nan] * len(scored)):
        if one.reference.dialogue.count > 0:
            found[scored[one.number]] = float(one.scored.terms["dialogue"])
    return found

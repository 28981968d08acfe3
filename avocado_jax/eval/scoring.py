"""Dlg.F1: compare the dialogue of captions and reference captions with the reward R_D, without a judge."""

import math
from collections.abc import Sequence

from avocado_jax.eval.rewarded import scores
from avocado_jax.rewards.vocabulary import make_table, word_weights


def dialogue_scores(captions: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
    """R_D of each caption against its reference caption; None if the reference has no dialogue."""
    found: list[float | None] = [None] * len(captions)
    scored = [number for number, text in enumerate(references) if text]
    if not scored:
        return found
    texts = [references[number] for number in scored]
    table = make_table(None, word_weights(texts))
    known = [{"caption": text} for text in texts]
    for entry in scores(table, [captions[number] for number in scored], known, [math.nan] * len(scored)):
        if entry.reference.dialogue.count > 0:
            found[scored[entry.number]] = float(entry.scored.terms["dialogue"])
    return found

"""Probes as judges receive them: a question with lettered choices, answered from the caption alone.

The reward is the share of a clip's probes that the judge answers rightly (`checklist.mean_score` of 1 and 0; NaN
without an answer). A caption without text answers nothing: its probes score 0, whatever a judge answers.
"""

import re
from collections.abc import Mapping

from avocado_jax.typing import Probe

CHOICE_LABELS = "ABCDEFGHIJ"
UNKNOWN = "N/A"  # the caption does not say: an answer, and a wrong one
PREFIX = re.compile(r"(?:the\s+)?(?:(?:correct|final|best)\s+)?(?:answer|choice|option)\b\s*(?:is\b)?\s*:?\s*", re.I)


def lettered(probe: Probe) -> dict[str, str]:
    """The choices by their letters."""
    return dict(zip(CHOICE_LABELS, probe.choices))


def as_text(probe: Probe) -> str:
    """The question, and a line for each choice."""
    return "\n".join([probe.question, *(f"{letter}. {text}" for letter, text in lettered(probe).items())])


def letter_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """The letter that an answer selects, UNKNOWN for "N/A", or None if it selects nothing.

    An answer is a letter, with or without its choice, or the choice itself, perhaps after "Answer:".

    Args:
        choices: by their letters.
    """
    text_only = _bare(answer)
    for text in dict.fromkeys((text_only, _bare(PREFIX.sub("", text_only, count=1)))):
        if text.upper() in (UNKNOWN, "NA"):
            return UNKNOWN
        if (found := re.fullmatch(r"\(?([A-Za-z])[).:]*", text)) and found[1].upper() in choices:
            return found[1].upper()
        for letter, choice in choices.items():
            forms = choice, f"{letter}. {choice}", f"{letter}: {choice}", f"({letter}) {choice}", f"{letter}) {choice}"
            if text in map(_bare, forms):
                return letter
    return None


def _bare(text: str) -> str:
    """Without white space, emphasis and quotation marks around it."""
    return text.strip().strip("*`\"'").strip()


def is_right(answer: str, probe: Probe) -> bool | None:
    """Whether an answer selects the right choice; None if it selects nothing."""
    letter = letter_of(answer, lettered(probe))
    return None if letter is None else letter == CHOICE_LABELS[probe.right]

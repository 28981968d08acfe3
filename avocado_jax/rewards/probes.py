"""Format probes for judges and parse the answers: a question with lettered choices, answered from the caption alone.

The reward is the share of a clip's probes that the judge answers correctly (`checklist.mean_score` of 1 and 0; NaN
without an answer). The probes of an empty caption score 0, whatever a judge answers.
"""

import re
from collections.abc import Mapping

from avocado_jax.typing import Probe

CHOICE_LABELS = "ABCDEFGHIJ"
UNKNOWN = "N/A"  # the answer for "the caption does not tell"; counted as wrong
PREFIX = re.compile(r"(?:the\s+)?(?:(?:correct|final|best)\s+)?(?:answer|choice|option)\b\s*(?:is\b)?\s*:?\s*", re.I)


def by_letter(probe: Probe) -> dict[str, str]:
    """Map letters to choices."""
    return dict(zip(CHOICE_LABELS, probe.choices))


def as_text(probe: Probe) -> str:
    """The question, followed by one line per choice."""
    return "\n".join([probe.question, *(f"{letter}. {text}" for letter, text in by_letter(probe).items())])


def letter_of(answer: str, choices: Mapping[str, str]) -> str | None:
    """Parse the letter that an answer selects: UNKNOWN for "N/A", None for an invalid answer.

    An answer is a letter, with or without its choice, or the choice itself, optionally after "Answer:".

    Args:
        choices: letter -> choice.
    """
    text_only = _strip(answer)
    for text in dict.fromkeys((text_only, _strip(PREFIX.sub("", text_only, count=1)))):
        if text.upper() in (UNKNOWN, "NA"):
            return UNKNOWN
        if (found := re.fullmatch(r"\(?([A-Za-z])[).:]*", text)) and found[1].upper() in choices:
            return found[1].upper()
        for letter, choice in choices.items():
            forms = choice, f"{letter}. {choice}", f"{letter}: {choice}", f"({letter}) {choice}", f"{letter}) {choice}"
            if text in map(_strip, forms):
                return letter
    return None


def _strip(text: str) -> str:
    """Strip white space, emphasis and quotation marks."""
    return text.strip().strip("*`\"'").strip()


def is_right(answer: str, probe: Probe) -> bool | None:
    """Whether an answer selects the right choice; None for an invalid answer."""
    letter = letter_of(answer, by_letter(probe))
    return None if letter is None else letter == CHOICE_LABELS[probe.right]

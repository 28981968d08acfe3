"""Parse the probes of manifests: multiple-choice questions about a clip that a judge answers from a caption alone."""

import re
from collections.abc import Mapping
from typing import Any

from avocado_jax.errors import InputError
from avocado_jax.typing import Probe

LABELS = "ABCDEFGHIJ"  # letters of the choices; their number is the maximum number of choices


def read_probe(value: Any) -> Probe:
    """Parse a probe `{"question", "choices": [str], "answer", "category"?}`.

    `answer` is a choice or its letter. Choices may begin with their letters ("A. red").

    Raises:
        InputError: a field is missing or invalid; the message does not name the line.
    """
    if not isinstance(value, Mapping):
        raise InputError("a probe is not an object")
    question, choices, answer = (value.get(name) for name in ("question", "choices", "answer"))
    if not isinstance(question, str) or not question.strip():
        raise InputError("a probe's 'question' is not a text, or empty")
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        raise InputError("a probe's 'choices' is not a list of texts")
    texts = [_without_letter(letter, choice) for letter, choice in zip(LABELS, choices)]
    if len(texts) < len(choices) or len(texts) < 2 or len(set(texts)) < len(texts) or not all(texts):
        raise InputError(f"a probe has from 2 to {len(LABELS)} different choices, not {choices!r:.100}")
    if not isinstance(answer, str):
        raise InputError("a probe's 'answer' is not a text")
    category = value.get("category", "")
    if not isinstance(category, str):
        raise InputError("a probe's 'category' is not a text")
    given = answer.strip()
    places = [index for index, pair in enumerate(zip(choices, texts)) if given in (pair[0].strip(), pair[1])]
    if not places:
        letter = given.strip("().: ").upper()
        places = [LABELS.index(letter)] if len(letter) == 1 and letter in LABELS[: len(texts)] else []
    if not places:
        raise InputError(f"the answer {answer!r:.60} is neither one of the choices nor the letter of one")
    return Probe(question.strip(), tuple(texts), places[0], category)


def _without_letter(letter: str, choice: str) -> str:
    return re.sub(rf"^\s*\(?{letter}[.):]\s+", "", choice).strip()

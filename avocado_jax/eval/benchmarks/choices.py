"""Multiple-choice questions that a judge answers from the caption alone."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import Answer, Ask, Judged, Record, Unit, percent, valid
from avocado_jax.remote.call import Malformed

UNKNOWN = "N/A"  # the caption does not tell
LETTERS = "ABCDEFGHIJ"


class Choice(Answer):
    """A letter, or N/A."""

    answer: str


class Question(NamedTuple):
    """One question of a clip."""

    text: str
    choices: Mapping[str, str]  # by their letters
    answer: str  # the right letter
    type: str


def question(where: str, text: str, choices: Sequence[str], answer: str, kind: str) -> Question:
    """A question whose choices may or may not begin with their letters.

    Raises:
        InputError: the right answer is none of them.
    """
    lettered = {}
    for letter, choice in zip(LETTERS, choices):
        lettered[letter] = re.sub(rf"^\s*\(?{letter}[.):]\s*", "", choice).strip()
    right = answer.strip().rstrip(".").upper()
    if len(lettered) < len(choices) or right not in lettered:
        raise InputError(f"{where}: the answer {answer!r:.40} is not the letter of one of its {len(choices)} choices")
    return Question(text, lettered, right, kind)


def letter_of(said: str, choices: Mapping[str, str]) -> str:
    """The letter that an answer means: the letter itself, with or without its choice, or the choice in full.

    Raises:
        Malformed: none of them, nor N/A.
    """
    said = said.strip()
    if said.upper() in (UNKNOWN, "NA"):
        return UNKNOWN
    if (found := re.fullmatch(r"\(?([A-Za-z])\)?[.:]?", said)) and found[1].upper() in choices:
        return found[1].upper()
    for letter, text in choices.items():
        if said in (text, f"{letter}. {text}", f"{letter}: {text}", f"({letter}) {text}", f"{letter}) {text}"):
            return letter
    raise Malformed(f"{said[:80]!r} is none of {', '.join(choices)} or {UNKNOWN}")


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """A unit a question: {"question", "choices", "truth", "answer" (a letter or N/A), "type"}."""

    async def one(asked: Question) -> Unit:
        told = {"question": asked.text, "choices": dict(asked.choices), "truth": asked.answer, "type": asked.type}
        fields = {"caption": caption, "question": asked.text, "choices": dict(asked.choices)}
        reply = await ask("multiple-choice", fields, Choice, lambda said: letter_of(said.answer, asked.choices))
        return told | ({"why": reply.why} if reply.value is None else {"answer": reply.value})

    return list(await asyncio.gather(*map(one, record.truth)))


def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
    """Of a hundred questions that were answered: `accuracy`; `unknown`, those answered N/A, which are not right."""
    units = valid(judged)
    right = sum(unit["answer"] == unit["truth"] for unit in units)
    unknown = sum(unit["answer"] == UNKNOWN for unit in units)
    return {"accuracy": percent(right, len(units)), "unknown": percent(unknown, len(units))}

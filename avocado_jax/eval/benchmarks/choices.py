"""Multiple-choice questions that a judge answers from the caption alone."""

import asyncio
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import Answer, Ask, Judged, Official, Record, Unit, answered, percent, valid
from avocado_jax.remote.answers import last_words, read_object
from avocado_jax.remote.call import Malformed
from avocado_jax.rewards.probes import CHOICE_LABELS, UNKNOWN, letter_of


class Choice(Answer):
    """A letter, or N/A."""

    answer: str


class Question(NamedTuple):
    """A question about a clip."""

    text: str
    choices: Mapping[str, str]  # letter -> choice
    answer: str  # the right letter
    type: str


def question(where: str, text: str, choices: Sequence[str], answer: str, kind: str) -> Question:
    """Build a question. Its choices may begin with their letters.

    Raises:
        InputError: the right answer is not one of the letters.
    """
    lettered = {}
    for letter, choice in zip(CHOICE_LABELS, choices):
        lettered[letter] = re.sub(rf"^\s*\(?{letter}[.):]\s*", "", choice).strip()
    right = answer.strip().rstrip(".").upper()
    if len(lettered) < len(choices) or right not in lettered:
        raise InputError(f"{where}: the answer {answer!r:.40} is not the letter of one of its {len(choices)} choices")
    return Question(text, lettered, right, kind)


def read_choice(text: str, choices: Mapping[str, str]) -> str:
    """Parse the letter that an answer selects, or UNKNOWN, from a JSON object with "answer" or text (`letter_of`).

    Raises:
        Malformed: the answer selects no choice.
    """
    try:
        texts = [read_object(text, Choice, python=True).answer]
    except Malformed:
        texts = last_words(text)
    for answer in texts:
        if letter := letter_of(answer, choices):
            return letter
    raise Malformed(f"{text.strip()[-80:]!r} is none of {', '.join(choices)} or {UNKNOWN}", text)


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """One unit per question: {"question", "choices", "truth", "answer" (a letter or N/A), "type"}."""

    async def ask_one(item: Question) -> Unit:
        unit = {"question": item.text, "choices": dict(item.choices), "truth": item.answer, "type": item.type}
        fields = {"caption": caption, "question": item.text, "choices": dict(item.choices)}
        reply = await ask("multiple-choice", fields, Choice, read=lambda text: read_choice(text, item.choices))
        return unit | ({"why": reply.why} if reply.value is None else {"answer": reply.value})

    return list(await asyncio.gather(*map(ask_one, record.truth)))


def _wrong(units: list[Unit]) -> list[Unit]:
    return [unit if "answer" in unit else answered(unit, answer="") for unit in units]


OFFICIAL = Official(("A question without a valid answer counts as wrong.",), treat=_wrong)


def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
    """Percentages of answered questions: `accuracy`, and `unknown`, the share of N/A, which is counted as wrong."""
    units = valid(judged)
    right = sum(unit["answer"] == unit["truth"] for unit in units)
    unknown = sum(unit["answer"] == UNKNOWN for unit in units)
    return {"accuracy": percent(right, len(units)), "unknown": percent(unknown, len(units))}

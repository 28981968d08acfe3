"""VDC detailed: questions about a silent clip, answered from the caption and graded against the truth."""

import asyncio
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import (
    Answer,
    Ask,
    Benchmark,
    Judged,
    Official,
    Record,
    Unit,
    all_different,
    answered,
    checked,
    mean,
)
from avocado_jax.jsonl import read_lines
from avocado_jax.remote.answers import last_words, read_object
from avocado_jax.remote.call import Malformed

LONGEST = 10_000  # maximum characters of an answer


class Told(Answer):
    """What the caption answers."""

    answer: Annotated[str, Field(min_length=1, max_length=LONGEST)]


class Graded(Answer):
    """Whether that is right, and how nearly."""

    pred: Literal["yes", "no"]
    score: Annotated[int, Field(ge=0, le=5)] | Annotated[float, Field(ge=0, le=5)]

    @field_validator("pred", mode="before")
    @classmethod
    def _lower(cls, value: object) -> object:
        return value.strip().lower() if isinstance(value, str) else value


QUESTION = "Describe in full detail all that can be seen in the video."  # visual only, like the official one


def read(path: Path) -> list[Record]:
    """Read the official file: lines {video id: [{"question", "answer", "category"}]}."""
    return all_different(path, _records(path))


def _records(path: Path) -> Iterator[Record]:
    for where, line in read_lines(path, {}):
        for name, questions in line.items():
            if not isinstance(questions, list) or not questions:
                raise InputError(f"{where}: {name[:80]!r} must be a list of questions")
            fields = {"question": str, "answer": str, "category": str}
            yield Record(name, (name,), QUESTION, None, [checked(where, item, fields) for item in questions])


def read_answer(text: str) -> str:
    """Parse the answer from a JSON object, or plain text in the official format.

    Raises:
        Malformed: the text has no answer.
    """
    try:
        return read_object(text, Told, python=True).answer
    except Malformed:
        answer = last_words(text)[0]
        if not 0 < len(answer) <= LONGEST or answer.startswith(("{", "[")):
            raise
        return answer


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """One unit per question: {"question", "truth", "answer", "correct", "score", "type"}."""

    async def ask_one(item: dict[str, str]) -> Unit:
        unit = {"question": item["question"], "truth": item["answer"], "type": item["category"]}
        reply = await ask("vdc-answer", {"caption": caption, "question": item["question"]}, Told, read=read_answer)
        if reply.value is None:
            return unit | {"why": reply.why}
        unit["answer"] = reply.value
        fields = {"question": item["question"], "answer": item["answer"], "prediction": unit["answer"]}
        graded = await ask("vdc-grade", fields, Graded)
        if graded.value is None:
            return unit | {"why": graded.why}
        return unit | {"correct": graded.value.pred == "yes", "score": graded.value.score}

    return list(await asyncio.gather(*map(ask_one, record.truth)))


def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
    """Means over a clip's questions and then over clips: `accuracy` in percent, `score` in [0, 5].

    As published, clips with zero accuracy or score are excluded; `zero_clips` is their number. `accuracy_all` and
    `score_all` include them.
    """
    clips = []
    for answers in judged:
        units = [unit for unit in answers.units if "why" not in unit]
        if units:
            clips.append((mean([100.0 * unit["correct"] for unit in units]), mean([unit["score"] for unit in units])))
    some = [clip for clip in clips if all(clip)]
    return {
        "accuracy": mean([right for right, _ in some]),
        "score": mean([score for _, score in some]),
        "accuracy_all": mean([right for right, _ in clips]),
        "score_all": mean([score for _, score in clips]),
        "zero_clips": len(clips) - len(some),
    }


def _ungraded(units: list[Unit]) -> list[Unit]:
    answered_ones = [unit for unit in units if "answer" in unit]
    return [answered(unit, correct=False, score=0) if "why" in unit else unit for unit in answered_ones]


BENCHMARK = Benchmark(
    "vdc",
    "VDC detailed",
    ("vdc-answer", "vdc-grade"),
    read,
    judge,
    measure,
    "accuracy",
    sound=False,
    frames=256,
    official=Official(("An answer without a valid grade counts as wrong, with a score of 0.",), treat=_ungraded),
    typical={"vdc-answer": "a few words about what can be seen there"},
)

"""VDC detailed: questions on a silent clip, answered from the caption and graded against the truth."""

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
    Record,
    Unit,
    all_different,
    checked,
    mean,
)
from avocado_jax.jsonl import read_lines


class Told(Answer):
    """What the caption answers."""

    answer: Annotated[str, Field(min_length=1, max_length=10_000)]


class Graded(Answer):
    """Whether that is right, and how nearly."""

    pred: Literal["yes", "no"]
    score: Annotated[int, Field(ge=0, le=5)] | Annotated[float, Field(ge=0, le=5)]

    @field_validator("pred", mode="before")
    @classmethod
    def _lower(cls, said: object) -> object:
        return said.strip().lower() if isinstance(said, str) else said


def read(path: Path) -> list[Record]:
    """The official file: lines {video id: [{"question", "answer", "category"}]}."""
    return all_different(path, _records(path))


def _records(path: Path) -> Iterator[Record]:
    for where, line in read_lines(path, {}):
        for name, asked in line.items():
            if not isinstance(asked, list) or not asked:
                raise InputError(f"{where}: {name[:80]!r} must be a list of questions")
            fields = {"question": str, "answer": str, "category": str}
            yield Record(name, (name,), None, None, [checked(where, one, fields) for one in asked])


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """A unit a question: {"question", "truth", "answer", "correct", "score", "type"}."""

    async def one(asked: dict[str, str]) -> Unit:
        told = {"question": asked["question"], "truth": asked["answer"], "type": asked["category"]}
        reply = await ask("vdc-answer", {"caption": caption, "question": asked["question"]}, Told)
        if reply.value is None:
            return told | {"why": reply.why}
        told["answer"] = reply.value.answer
        fields = {"question": asked["question"], "answer": asked["answer"], "prediction": told["answer"]}
        graded = await ask("vdc-grade", fields, Graded)
        if graded.value is None:
            return told | {"why": graded.why}
        return told | {"correct": graded.value.pred == "yes", "score": graded.value.score}

    return list(await asyncio.gather(*map(one, record.truth)))


def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
    """Means over a clip's questions, then over clips: `accuracy` of a hundred, `score` from 0 to 5.

    As published, a clip whose accuracy or score is zero is left out of these two; `zero_clips` says how many were,
    and `accuracy_all` and `score_all` hold them too.
    """
    clips = []
    for one in judged:
        units = [unit for unit in one.units if "why" not in unit]
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


BENCHMARK = Benchmark(
    "vdc", "VDC detailed", ("vdc-answer", "vdc-grade"), read, judge, measure, "accuracy", sound=False, frames=256
)

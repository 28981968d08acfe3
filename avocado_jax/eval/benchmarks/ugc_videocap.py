"""UGC-VideoCap: a judge grades a caption's sound, picture and details against the reference."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

from pydantic import AliasChoices, Field

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
    read_json,
    valid,
)

GRADES = ("audio", "visual", "detail")
Grade = Annotated[int, Field(ge=1, le=5)]


class Grades(Answer):
    """From 1 to 5 each. The official prompt calls the last one "details"."""

    audio: Grade
    visual: Grade
    detail: Grade = Field(validation_alias=AliasChoices("detail", "details"))


def read(path: Path) -> list[Record]:
    """Read the official file: {"question", "samples": [{"video_id", "path", "answer"}]}."""
    content = checked(str(path), read_json(path, dict), {"question": str, "samples": list})
    return all_different(path, _records(path, content))


def _records(path: Path, content: dict) -> Iterator[Record]:
    for number, sample in enumerate(content["samples"], start=1):
        clip = checked(f"{path}: sample {number}", sample, {"video_id": str, "answer": str})
        yield Record(clip["video_id"], (clip["video_id"],), content["question"].strip(), clip["answer"], None)


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """One unit with the three grades."""
    reply = await ask("ugc-videocap", {"reference": record.reference, "caption": caption}, Grades)
    return [{"why": reply.why} if reply.value is None else reply.value.model_dump()]


def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
    """The mean of each grade in percent of 5, and the mean of the three."""
    units = valid(judged)
    means = {name: mean([20.0 * unit[name] for unit in units]) for name in GRADES}
    return {**means, "average": mean(list(means.values())) if units else None}


def _ungraded(units: list[Unit]) -> list[Unit]:
    return [answered(unit, **dict.fromkeys(GRADES, 0)) if "why" in unit else unit for unit in units]


BENCHMARK = Benchmark(
    "ugc-videocap",
    "UGC-VideoCap",
    ("ugc-videocap",),
    read,
    judge,
    measure,
    "average",
    official=Official(("A caption without valid grades counts 0 in all three.",), treat=_ungraded),
)

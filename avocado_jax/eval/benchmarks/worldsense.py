"""WorldSense: questions about real-world clips, answered from the caption alone."""

import re
from collections.abc import Iterator
from pathlib import Path

from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import Benchmark, Record, all_different, checked, read_json
from avocado_jax.eval.benchmarks.choices import OFFICIAL, judge, measure, question

FIELDS = {"task_type": str, "question": str, "answer": str, "candidates": [str]}


def read(path: Path) -> list[Record]:
    """Read the official file: {video id: {..., "task0": {"task_type", "question", "answer", "candidates"}, ...}}."""
    return all_different(path, _records(path))


def _records(path: Path) -> Iterator[Record]:
    for name, entry in read_json(path, dict).items():
        where = f"{path}: clip {name[:80]!r}"
        clip = checked(where, entry, {})
        tasks = [checked(where, clip[key], FIELDS) for key in clip if re.fullmatch(r"task\d+", key)]
        if not tasks:
            raise InputError(f'{where}: no "task0"')
        questions = [
            question(where, task["question"], task["candidates"], task["answer"], task["task_type"]) for task in tasks
        ]
        # Either field may exist; the first is a class of durations, the second a duration.
        known = [clip[key] for key in ("duration", "video_duration") if isinstance(clip.get(key), str)]
        caption = clip.get("video_caption")
        groups = {"duration": known[0]} if known else {}
        yield Record(name, (name,), None, caption if isinstance(caption, str) else None, questions, groups)


BENCHMARK = Benchmark(
    "worldsense",
    "WorldSense",
    ("multiple-choice",),
    read,
    judge,
    measure,
    "accuracy",
    frames=256,
    official=OFFICIAL,
)

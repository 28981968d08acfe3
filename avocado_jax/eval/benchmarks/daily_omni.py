"""Daily-Omni: audiovisual questions, answered from the caption alone."""

from collections.abc import Iterator
from pathlib import Path

from avocado_jax.eval.benchmarks.benchmark import Benchmark, Record, all_different, checked, read_json
from avocado_jax.eval.benchmarks.choices import OFFICIAL, judge, measure, question


def read(path: Path) -> list[Record]:
    """Read the official file: [{"video_id", "video_duration", "questions": [{"Question", "Choice", "Answer"}]}]."""
    return all_different(path, _records(path))


def _records(path: Path) -> Iterator[Record]:
    fields = {"Question": str, "Choice": [str], "Answer": str, "Type": str}
    for number, entry in enumerate(read_json(path, list), start=1):
        where = f"{path}: clip {number}"
        clip = checked(where, entry, {"video_id": str, "video_duration": str, "questions": [dict]})
        questions = [
            question(where, item["Question"], item["Choice"], item["Answer"], item["Type"])
            for item in (checked(where, item, fields) for item in clip["questions"])
        ]
        name = clip["video_id"]
        paths = (name, f"{name}/{name}_video.mp4")
        yield Record(name, paths, None, None, questions, {"duration": clip["video_duration"]})


BENCHMARK = Benchmark(
    "daily-omni",
    "Daily-Omni",
    ("multiple-choice",),
    read,
    judge,
    measure,
    "accuracy",
    frames=256,
    official=OFFICIAL,
)

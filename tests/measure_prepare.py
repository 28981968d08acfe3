"""Measure `prepare` at size: memory of the main process on a long manifest, and a start over many finished shards.

  python tests/measure_prepare.py [--lines 300000] [--shards 2000] [--latency 0.05]

Clips are not read: shards are replaced by the files that list them. Prints one JSON object for each measurement, and
exits with 1 if the memory exceeds 1.5 GB, or the start takes more than 15 s or 10 requests.
"""

import argparse
import json
import resource
import sys
import tempfile
import time
from pathlib import Path

import gcs
import pytest

from avocado_jax.data import prepare as module
from avocado_jax.data import storage
from avocado_jax.data.make_shard import MEASURED, Job, json_line
from avocado_jax.data.prepare import prepare

CAPTION = "A caption of the length of those of the training set, in bytes. " * 50  # 3.2 KB


def main() -> int:
    """Run both measurements."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lines", type=int, default=300_000)
    parser.add_argument("--shards", type=int, default=2000)
    parser.add_argument("--latency", type=float, default=0.05)
    args = parser.parse_args()
    module.run_tasks = fake_tasks
    with tempfile.TemporaryDirectory() as folder:
        peak = long_manifest(Path(folder), args.lines)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        seconds, requests = finished_shards(Path(folder), args.shards, args.latency, patch)
    return int(peak > 1.5e9 or seconds > 15 or requests >= 10)


def fake_tasks(job, source, tasks, workers):
    """Replaces reading clips: list records for each row."""
    for task in tasks:
        columns = {name: [100] * len(task.rows) for name in MEASURED}
        columns |= {"id": [f"clip-{row.number}" for row in task.rows], "line": [row.number for row in task.rows]}
        made = {"file": task.name, "part": "", "bytes": 1, "md5": "0" * 32, "columns": columns}
        path = storage.join(job.out, f"parts/{task.name}.none.json")
        storage.write(path, json_line(made | {"warnings": [], "rejects": []}).encode())
        yield task.name


def manifest(path: Path, lines: int) -> None:
    with path.open("w") as file:
        for number in range(lines):
            file.write(json.dumps({"id": f"clip-{number + 1}", "video": f"{number}.mp4", "caption": CAPTION}) + "\n")


def long_manifest(folder: Path, lines: int) -> float:
    """Peak memory of the main process in bytes, for a manifest of `lines` lines."""
    manifest(folder / "clips.jsonl", lines)
    start = time.monotonic()
    done = prepare(Job(str(folder / "clips.jsonl"), str(folder / "out")), 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    size = (folder / "clips.jsonl").stat().st_size
    report("long manifest", lines=lines, manifest_bytes=size, records=done.records, peak_bytes=peak, start=start)
    return peak


def finished_shards(folder: Path, shards: int, latency: float, patch: pytest.MonkeyPatch) -> tuple[float, int]:
    """Seconds and requests of a start over a bucket whose shards are all done, and of `--finish`."""
    manifest(folder / "clips.jsonl", shards)
    job = Job(str(folder / "clips.jsonl"), "gs://bucket/out", shard_records=1)
    with gcs.proxied_bucket(folder / "storage", patch) as proxy:
        prepare(job, 1, shard=(0, 1))  # without latency
        answer = proxy.answer
        proxy.answer = lambda request: (time.sleep(latency), answer(request))
        proxy.requests.clear()
        start = time.monotonic()
        assert prepare(job, 1, shard=(0, 1)) is None
        requests = len(proxy.requests)
        seconds = report("start over finished shards", shards=shards, requests=requests, start=start)
        proxy.requests.clear()
        start = time.monotonic()
        assert prepare(job, 1, finish=True).records == shards
        report("finish", shards=shards, requests=len(proxy.requests), start=start)
    return seconds, requests


def report(what: str, start: float, **figures) -> float:
    seconds = time.monotonic() - start
    print(json.dumps({"what": what} | figures | {"seconds": round(seconds, 2)}), flush=True)
    return seconds


if __name__ == "__main__":
    sys.exit(main())

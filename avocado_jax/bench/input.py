"""Benchmark the input pipeline: rows per second of one core, and the time of each stage."""

import time
from typing import Any

from avocado_jax.data.media import Reading
from avocado_jax.data.prompt import Prompt
from avocado_jax.data.records import decoded
from avocado_jax.data.rows import make_row, rounded, shape_of, stack
from avocado_jax.data.sources import open_shards
from avocado_jax.models.config import SIZES

STAGES = ("read", "decode", "features", "pad")
PROMPT = Prompt([0] * 60, [0] * 60)  # only the length matters


def bench_input(folder: str, size: str, reading: Reading, most: int = 64) -> dict[str, Any]:
    """Read up to `most` records of a prepared folder sequentially, as one worker does.

    Returns the seconds of each stage, and rows and bytes per second of CPU time, which other processes and the
    decoder's threads do not distort.
    """
    config, source = SIZES[size], open_shards(folder, reading)
    stages, count, nbytes = dict.fromkeys(STAGES, 0.0), min(most, len(source)), 0
    make_row(decoded(source[0], reading), PROMPT, config, reading)  # warm-up
    begun, used = time.perf_counter(), time.process_time()
    for number in range(count):
        marks = [time.perf_counter()]
        record = source[number]
        marks.append(time.perf_counter())
        media = decoded(record, reading)
        marks.append(time.perf_counter())
        clip = make_row(media, PROMPT, config, reading).clip
        marks.append(time.perf_counter())
        nbytes += sum(leaf.nbytes for leaf in stack([clip], rounded(shape_of(clip))))
        marks.append(time.perf_counter())
        for stage, first, last in zip(STAGES, marks, marks[1:]):
            stages[stage] += last - first
    core = time.process_time() - used
    return {
        "what": "input",
        "size": size,
        "seconds": time.perf_counter() - begun,
        "rows": count,
        "rows_per_second_per_core": count / core,
        "bytes_per_second": nbytes / core,
        "stages": stages,
    }

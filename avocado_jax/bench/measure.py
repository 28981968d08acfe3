"""Timing, and measured peak rates of this machine."""

import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Ceilings(NamedTuple):
    """Measured peak rates of this machine."""

    flops: float  # FLOP/s of a large matrix product in the dtype
    bytes: float  # bytes/s: the faster of a large copy (read and write) and a large sum (read)


def seconds_of(run: Callable[[], Any], repeats: int = 3) -> float:
    """The median seconds of `run` after a first, compiling call; waits for the results."""
    jax.block_until_ready(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def ceilings(dtype: str) -> Ceilings:
    """Measure a matrix product, a copy and a sum, sized for the device."""
    cpu = jax.default_backend() == "cpu"
    width, length = (1024, 2**24) if cpu else (8192, 2**29)
    a = jax.random.normal(jax.random.key(0), (width, width), dtype)  # constants draw less power and run faster
    product = jax.jit(lambda a: a @ a)
    x = jnp.ones(length, jnp.float32)
    copy, total = jax.jit(lambda x: -x), jax.jit(jnp.sum)
    moved = max(2 * x.nbytes / seconds_of(lambda: copy(x)), x.nbytes / seconds_of(lambda: total(x)))
    return Ceilings(2 * width**3 / seconds_of(lambda: product(a)), moved)


def row(
    what: str, size: str, seconds: float, steps: int, tokens: float, flops: float, nbytes: float, dtype: str
) -> dict[str, Any]:
    """The result of `steps` steps that took `seconds`, with its rates and the peak rates of the machine."""
    stats = jax.local_devices()[0].memory_stats() or {}  # before the peak-rate measurement allocates memory
    top = ceilings(dtype)
    return {
        "what": what,
        "size": size,
        "seconds": seconds,
        "step_ms": 1e3 * seconds / steps,
        "tokens_per_second": tokens / seconds,
        "tflops": flops / seconds / 1e12,
        "mfu": flops / seconds / top.flops,
        "bytes_per_second": nbytes / seconds,
        "ceiling_tflops": top.flops / 1e12,
        "ceiling_bytes_per_second": top.bytes,
        "peak_bytes": stats.get("peak_bytes_in_use"),
        "device": jax.local_devices()[0].device_kind,
    }

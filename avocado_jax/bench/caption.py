"""Benchmark the captioning engine in its steady state with random weights: finished slots are refilled."""

import time
from contextlib import nullcontext
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.bench.measure import row
from avocado_jax.bench.model import FRAME, FRAMES, random_clip, random_policy
from avocado_jax.models.flops import decoding_work, prefill_work
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.logits import GREEDY


def bench_caption(
    size: str, slots: int, clip_tokens: int, caption_tokens: int, dtype: str, sizes: tuple[int, int] = (1, 1)
) -> dict[str, Any]:
    """Caption one clip per slot; the prefills are spread evenly over the decode steps.

    `floor_seconds` is the time of the prefill FLOPs and of the bytes read by the decode steps, at the measured peak
    rates of one device. FLOPs and bytes are per device.

    Args:
        slots: per data replica.
        sizes: (data replicas, devices per replica).
    """
    data, tensor = sizes
    mesh = make_mesh(data, 1, tensor, devices=jax.devices()[: data * tensor]) if data * tensor > 1 else None
    config, params = random_policy(size, dtype, mesh)
    clip = random_clip(config, clip_tokens, FRAMES.get(size, FRAME))
    shape = (clip_tokens, *clip.patches.shape[1:3], clip.mel.shape[1])
    clips = jax.tree.map(lambda leaf: jnp.repeat(leaf, data, axis=0), clip)
    if mesh:
        clips = jax.device_put(clips, rows_sharding(mesh))
    dispatches = -(-caption_tokens // programs.STEPS)
    state = programs.empty(config, mesh, clip_tokens, slots * data, caption_tokens)
    banned = jnp.zeros(config.text.vocab, bool)
    filled = [slots * count // dispatches for count in range(dispatches + 1)]
    numbers = np.zeros(data, np.int32)

    windows = [programs.window_of(caption_tokens, number * programs.STEPS) for number in range(dispatches)]

    def admit(slot: int) -> None:
        nonlocal state
        index = np.full((data, 1), slot, np.int32)
        state = programs.admit(state, params, clips, None, np.uint32(0), numbers, index, config, mesh)

    def advance(window: int) -> None:
        nonlocal state
        state = programs.advance(state, params, banned, config, mesh, GREEDY, (-1,), window)

    with jax.set_mesh(mesh) if mesh else nullcontext():
        admit(0)
        for window in sorted(set(windows)):  # compile the program of each window
            advance(window)
        jax.block_until_ready(state)
        start = time.perf_counter()
        for number, (begin, end) in enumerate(pairwise(filled)):
            for slot in range(begin, end):
                admit(slot)
            advance(windows[number])
        jax.block_until_ready(state)
        seconds = time.perf_counter() - start
    item = jnp.dtype(dtype).itemsize
    prefill = prefill_work(config, shape, item, tensor)
    step = decoding_work(config, shape, caption_tokens, slots, item, tensor)
    flops = (slots * prefill.flops + caption_tokens * step.flops) / tensor
    nbytes = caption_tokens * step.bytes
    result = row("caption", size, seconds, caption_tokens, data * slots * caption_tokens, flops, nbytes, dtype)
    floor = slots * prefill.flops / tensor / (1e12 * result["ceiling_tflops"])
    floor += nbytes / result["ceiling_bytes_per_second"]
    rates = {"clips_per_second": data * slots / seconds, "floor_seconds": floor, "devices": data * tensor}
    return result | rates

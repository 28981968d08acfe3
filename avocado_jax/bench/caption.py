"""The captioning engine in its steady state with random weights: all slots decode, finished ones are refilled."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.bench.measure import row, seconds_of
from avocado_jax.bench.model import FRAME, FRAMES, random_clip, random_policy
from avocado_jax.models.flops import decode_bytes, row_flops
from avocado_jax.sampling import slots as programs
from avocado_jax.sampling.logits import GREEDY


def bench_caption(size: str, slots: int, clip_tokens: int, caption_tokens: int, dtype: str) -> dict[str, Any]:
    """Caption as many clips as there are slots: one prefill a clip, spread evenly over the decoding steps.

    The floor is the time of the prefill FLOPs and of the bytes that the decoding steps read, at the measured ceilings.
    """
    config, params = random_policy(size, dtype)
    clip = random_clip(config, clip_tokens, FRAMES.get(size, FRAME))
    dispatches = -(-caption_tokens // programs.STEPS)
    options = dict(config=config, mesh=None)
    state = programs.empty(clip_tokens=clip_tokens, slots=slots, length=caption_tokens, **options)
    banned = jnp.zeros(config.text.vocab, bool)
    filled = [slots * count // dispatches for count in range(dispatches + 1)]

    zero = np.zeros(1, np.int32)

    def cycle() -> jax.Array:
        nonlocal state
        for begin, end in pairwise(filled):
            for slot in range(begin, end):
                index = np.array([[slot]], np.int32)
                state = programs.admit(state, params, clip, zero, np.uint32(0), zero, index, **options)
            state = programs.advance(
                state, params, banned, sampling=GREEDY, stops=(-1,), length=caption_tokens, **options
            )
        return state.step

    seconds = seconds_of(cycle, repeats=1)
    clip_only, both = (row_flops(config, (clip_tokens, *_sizes(clip)), captions, caption_tokens) for captions in (0, 1))
    item = jnp.dtype(dtype).itemsize
    weights = decode_bytes(config, 0, 0, 0, item)
    cache = decode_bytes(config, clip_tokens, 1, caption_tokens / 2, item) - weights
    nbytes = caption_tokens * (weights + slots * cache)
    result = row("caption", size, seconds, caption_tokens, slots * caption_tokens, slots * both.total, nbytes, dtype)
    floor = slots * clip_only.total / (1e12 * result["ceiling_tflops"]) + nbytes / result["ceiling_bytes_per_second"]
    return result | {"clips_per_second": slots / seconds, "floor_seconds": floor}


def _sizes(clip: Any) -> tuple[int, int, int]:
    """Temporal patches, windows of one, and chunks of sound."""
    return (*clip.patches.shape[1:3], clip.mel.shape[1])

"""Benchmark a step of supervised fine-tuning with random weights, on all devices of this machine."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.bench.measure import row, seconds_of
from avocado_jax.bench.model import FRAME, FRAMES, random_clip
from avocado_jax.config import SftConfig
from avocado_jax.models.config import SIZES
from avocado_jax.models.flops import train_flops
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.sft import model_of, sft_program
from avocado_jax.typing import Captions


def bench_sft(size: str, group: int, clip_tokens: int, caption_tokens: int, dtype: str, remat: str) -> dict[str, Any]:
    """Measure the paper's step (frozen encoders, AdamW in fp32) with one clip of `group` captions per device.

    Tokens are those of clips and captions; FLOPs are model FLOPs, without rematerialization.
    """
    devices = jax.device_count()
    config = SftConfig(batch=devices, dtype=dtype, frozen_dtype=dtype, remat=remat)
    model, mesh = model_of(config, SIZES[size]), make_mesh(1, -1, 1)
    clip = random_clip(model, clip_tokens, FRAMES.get(size, FRAME))
    shape = (clip_tokens, clip.patches.shape[1], clip.patches.shape[2], clip.mel.shape[1])
    ids = np.zeros((devices, group, caption_tokens), np.int32)
    batch = (
        jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), devices, 0), clip),
        Captions(ids, ids, np.ones(ids.shape, bool)),
        np.ones(devices, np.float32),
        np.zeros(devices, np.int32),
    )
    with jax.set_mesh(mesh):
        shapes, step, start = sft_program(config, model, mesh, 1000)
        leaves, tree = jax.tree.flatten(shapes.params)
        # Leaf by leaf: `init` would need twice the memory.
        make = [
            jax.jit(partial(jax.random.normal, shape=leaf.shape, dtype=leaf.dtype), out_shardings=leaf.sharding)
            for leaf in leaves
        ]
        keys = jax.random.split(jax.random.key(0), len(leaves))
        state = [start(tree.unflatten(0.02 * draw(key) for draw, key in zip(make, keys)))]
        placed = jax.device_put(batch, rows_sharding(mesh))

        def run() -> Any:
            state[0], metrics = step(state[0], *placed)  # the step donates the state's buffers
            return metrics

        seconds = seconds_of(run)
        if not bool(jnp.isfinite(run()["loss"])):
            raise FloatingPointError("the loss of random weights is not finite")
    tokens = devices * (clip_tokens + group * caption_tokens)
    flops = devices * train_flops(model, shape, group, caption_tokens, config.train)
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(state[0]))
    del state[0], placed  # free memory for the peak-rate measurement
    return row("sft", size, seconds, 1, tokens, flops / devices, nbytes, dtype)

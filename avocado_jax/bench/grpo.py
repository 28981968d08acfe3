"""Benchmark the phases of a GRPO step with random weights, on all devices of this machine."""

import statistics
import sys
import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.bench.measure import row
from avocado_jax.bench.model import FRAME, FRAMES, random_clip
from avocado_jax.config import GrpoConfig, ObjectiveConfig, SamplingConfig
from avocado_jax.models.config import SIZES
from avocado_jax.models.flops import decode_bytes, grpo_flops, text_layer_parameters
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.grpo import Experience, grpo_program
from avocado_jax.train.objective import advantages
from avocado_jax.train.sft import model_of

PHASES = ("encode", "view", "prefill", "decode", "reference", "update")
ROLLOUT = ("view", "prefill", "decode")  # once per rollout; the others once per batch
REPEATS = 3


def bench_grpo(
    size: str,
    group: int,
    clip_tokens: int,
    caption_tokens: int,
    dtype: str,
    remat: str,
    train: str,
    batches: int = 1,
    int8: bool = False,
) -> dict[str, Any]:
    """Measure the paper's step (frozen encoders, AdamW in fp32), a clip per device and batch.

    `batches` are rolled out together, with int8 kernels if `int8` is set; each has an update. All captions have
    `caption_tokens` tokens, the worst case. `prefill` is a rollout of one token, `decode` the additional time of a full
    rollout. `step_ms` is the time per update: a share of view, prefill and decode, and the other phases. FLOPs are
    model FLOPs, without rematerialization; bytes are those that decoding reads.
    """
    devices = jax.device_count()
    config = GrpoConfig(
        batch=devices,
        group=group,
        rollout_batches=batches,
        rollout_int8=int8,
        objective=ObjectiveConfig(importance_cap=2.0 if int8 or batches > 1 else 0.0),
        train=train,
        dtype=dtype,
        frozen_dtype=dtype,
        reference_dtype=dtype,
        remat=remat,
        sampling=SamplingConfig(tokens=caption_tokens),
    )
    model, mesh = model_of(config, SIZES[size]), make_mesh(1, -1, 1)
    clip = random_clip(model, clip_tokens, FRAMES.get(size, FRAME))
    shape = (clip_tokens, clip.patches.shape[1], clip.patches.shape[2], clip.mel.shape[1])
    repeated = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), config.batch, 0), clip)
    stop = jnp.arange(model.text.vocab) == 0  # mask of the stop token: bans it, or (inverted) all other tokens
    times: dict[str, list[float]] = {phase: [] for phase in PHASES}
    with jax.set_mesh(mesh):
        program = grpo_program(config, model, mesh, 1000 * batches, (0,))
        params = _random(program.state.params)
        reference = _copy_unshared(params, program.reference)
        state, rows = program.begin(params), jax.device_put(repeated, rows_sharding(mesh))
        del params

        def timed(phase: str, run: Any) -> Any:
            begun = time.perf_counter()
            result = jax.block_until_ready(run())
            times[phase].append(time.perf_counter() - begun)
            # Printed immediately: a later phase may run out of memory.
            print(f"{phase}: {times[phase][-1]:.3f} s", file=sys.stderr, flush=True)
            return result

        for step in range(1 + REPEATS):  # the first step compiles
            number = jnp.int32(step)
            encoded = timed("encode", lambda: program.encode(state.params, rows))  # noqa: B023
            view = timed("view", lambda: program.view(state.params))  # noqa: B023
            inputs = view, (rows,) * batches, (encoded,) * batches, number
            timed("prefill", lambda: program.roll_out(*inputs, ~stop))  # noqa: B023
            rollout, *_ = timed("decode", lambda: program.roll_out(*inputs, stop))  # noqa: B023
            del view, inputs, _  # free memory for the update
            captions = rollout.captions
            scored = timed("reference", lambda: program.score(state.params, reference, rows, encoded, captions))  # noqa: B023
            rewards = jax.random.uniform(jax.random.key(step), (config.batch, group))
            placed = (advantages(rewards, config.objective), jnp.ones(config.batch))
            placed = jax.device_put(placed, rows_sharding(mesh))
            experience = Experience(rows, encoded, rollout, scored, *placed)
            state, metrics = timed("update", lambda: program.update(state, experience))  # noqa: B023
            if not bool(jnp.isfinite(metrics["loss"])):
                raise FloatingPointError("the loss of random weights is not finite")
        gap, length = float(metrics["sampler_gap"]), float(metrics["length"])
        del state, reference, encoded, rollout, scored, experience, rows  # free memory for the peak-rate measurement

    seconds = {phase: statistics.median(durations[1:]) for phase, durations in times.items()}
    seconds["decode"] -= seconds["prefill"]
    flops = sum(grpo_flops(model, shape, group, caption_tokens, train))
    itemsize, mean = jnp.dtype(dtype).itemsize, caption_tokens / 2
    nbytes = caption_tokens * decode_bytes(model, batches * clip_tokens, batches * group, mean, itemsize)
    nbytes -= int8 * caption_tokens * model.text.layers * text_layer_parameters(model) * (itemsize - 1)
    tokens = config.batch * (clip_tokens + group * caption_tokens)
    update = sum(value / (batches if phase in ROLLOUT else 1) for phase, value in seconds.items())
    figures = row("grpo", size, update, 1, tokens, flops, nbytes / batches, dtype)
    phases = {f"{phase}_ms": 1e3 * value for phase, value in seconds.items()}
    decoded = {
        "decode_step_ms": phases["decode_ms"] / max(1, caption_tokens - 1),
        "decode_tokens_per_second": batches * config.batch * group * caption_tokens / max(seconds["decode"], 1e-9),
        "decode_bytes_per_second": nbytes / max(seconds["decode"], 1e-9),
    }
    chosen = {"train": train, "batches": batches, "int8": int8}
    return {**figures, **chosen, **phases, **decoded, "sampler_gap": gap, "length": length}


def _random(shapes: Any) -> Any:
    """Small random parameters, created leaf by leaf: `init` would need twice the memory."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))

    def make(key: jax.Array, leaf: Any) -> jax.Array:
        draw = partial(jax.random.normal, shape=leaf.shape, dtype=leaf.dtype)
        return jax.jit(lambda key: 0.02 * draw(key), out_shardings=leaf.sharding)(key)

    return tree.unflatten(make(key, leaf) for key, leaf in zip(keys, leaves))


def _copy_unshared(params: Any, shapes: Any) -> Any:
    """Copy the parameters that the reference does not share with the policy."""
    flat = flatten_dict(params)
    copy = {path: jnp.array(flat[path], leaf.dtype, copy=True) for path, leaf in flatten_dict(shapes).items()}
    return unflatten_dict(copy)

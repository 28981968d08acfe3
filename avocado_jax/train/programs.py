"""The jitted programs of a step and the shapes, dtypes and shardings that a run calls them with.

A run compiles them before step 1; `plan` compiles them for devices that this machine does not have.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, Sharding

from avocado_jax.config import GrpoConfig, RunConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import example
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.parallel.rules import shardings
from avocado_jax.train.grpo import Experience, GrpoProgram, Scored
from avocado_jax.train.rollout import VIEW_AXES, Rollout, crop

EVAL_CLIPS = 64  # held-out clips that are captioned together, at most


class StepShapes(NamedTuple):
    """What the programs of a GRPO step pass on, for one bucket; every leaf is a ShapeDtypeStruct with its sharding."""

    batch: tuple[Any, ...]  # `batch_shapes`
    encoded: Any  # None where the encoders are trained
    view: Any
    rollout: Rollout  # of a batch, at its full width


def batch_shapes(config: RunConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh, rows: int) -> tuple[Any, ...]:
    """A batch on the mesh: clip, captions (None in GRPO, which samples its own), weight, captions cut."""
    clip, captions = example(model, rows, config.data.references, tuple(bucket.shape), bucket.caption)
    shapes = clip, None if isinstance(config, GrpoConfig) else captions
    per_row = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32))
    return by_rows((*shapes, *per_row), mesh)


def step_shapes(
    config: GrpoConfig, model: ThinkerConfig, program: GrpoProgram, bucket: Bucket, mesh: Mesh
) -> StepShapes:
    """The shapes of a GRPO step on a bucket."""
    batch = batch_shapes(config, model, bucket, mesh, config.batch * config.split)
    params = program.state.params
    encoded = program.encode and by_rows(jax.eval_shape(program.encode, params, batch[0]), mesh)
    view = view_shapes(program)
    rollout, *_ = jax.eval_shape(program.roll_out, *_sampling(model, program, view, batch[0], encoded, 1))
    return StepShapes(batch, encoded, view, by_rows(rollout, mesh))


def view_shapes(program: GrpoProgram) -> Any:
    """The sampler's parameters."""
    view = jax.eval_shape(program.view, program.state.params)
    return jax.tree.map(with_sharding, view, shardings(view, program.sampler_mesh, over=VIEW_AXES))


def heldout_rows(config: GrpoConfig, clips: int = EVAL_CLIPS) -> int:
    """Rows of a batch of held-out clips, of which there are `clips`: a multiple of those of a training step."""
    rows = config.batch * config.split
    return rows * -(-min(EVAL_CLIPS, clips) // rows)


def sampling_programs(
    config: GrpoConfig, model: ThinkerConfig, program: GrpoProgram, shapes: StepShapes
) -> dict[str, Program]:
    """`encode` (where the encoders are frozen), `view` and `rollout`."""
    clip, params = shapes.batch[0], program.state.params
    count = config.rollout_batches + config.oversample // config.batch
    sampling = _sampling(model, program, shapes.view, clip, shapes.encoded, count)
    programs = {"encode": Program("encode", program.encode, (params, clip))} if program.encode else {}
    return programs | {
        "view": Program("view", program.view, (params,)),
        "rollout": Program("rollout", program.roll_out, sampling),
    }


def learning_programs(
    config: GrpoConfig, program: GrpoProgram, shapes: StepShapes, mesh: Mesh, width: int
) -> dict[str, Program]:
    """`score` and `update`, for captions cut to `width` tokens."""
    clip, _, weight, _ = shapes.batch
    rollout = by_rows(jax.eval_shape(partial(crop, width=width), shapes.rollout), mesh)
    reference = program.reference if config.objective.beta else {}
    scoring = program.state.params, reference, clip, shapes.encoded, rollout.captions
    scored: Scored = by_rows(jax.eval_shape(program.score, *scoring), mesh)
    advantage = by_rows(jax.ShapeDtypeStruct(rollout.lengths.shape, jnp.float32), mesh)
    experience = Experience(clip, shapes.encoded, rollout, scored, advantage, weight)
    return {
        "score": Program(f"score of {width} tokens", program.score, scoring),
        "update": Program(f"update of {width} tokens", program.update, (program.state, experience)),
    }


def by_rows(shapes: Any, mesh: Mesh) -> Any:
    """The same shapes, divided over the mesh by rows."""
    sharding = rows_sharding(mesh)
    return jax.tree.map(lambda leaf: with_sharding(leaf, sharding), shapes)


def with_sharding(leaf: Any, sharding: Sharding) -> jax.ShapeDtypeStruct:
    """The shape of an array that lies so."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _sampling(
    model: ThinkerConfig, program: GrpoProgram, view: Any, clip: Any, encoded: Any, batches: int
) -> tuple[Any, ...]:
    """Arguments of `roll_out`."""
    step = program.state.step
    banned = jax.ShapeDtypeStruct((model.text.vocab,), jnp.bool_, sharding=step.sharding)  # replicated
    return view, (clip,) * batches, (encoded,) * batches, step, banned

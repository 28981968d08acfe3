"""The programs that a step runs one after the other, and what lies on the devices beside each."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from avocado_jax.config import GrpoConfig, RunConfig, SftConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import example
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.parallel.rules import shardings
from avocado_jax.train.grpo import Experience, grpo_program
from avocado_jax.train.rollout import VIEW_OVER
from avocado_jax.train.sft import sft_program
from avocado_jax.train.state import State

STOPS = (0, 1)  # which ids end a caption changes nothing of what a program takes
STEPS = 1000  # of a run that does not say: they are in the schedule only


class Phase(NamedTuple):
    """One jitted program; every leaf is a ShapeDtypeStruct with its sharding.

    Attributes:
        alive: what lies on the devices while it runs, its own arguments included, by name.
    """

    name: str
    run: Any
    args: tuple[Any, ...]
    alive: dict[str, Any]

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """Trace it for the mesh's devices, into what their compiler takes."""
        with jax.set_mesh(mesh):
            return self.run.lower(*self.args)


def sft_phases(config: SftConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh) -> tuple[Phase, ...]:
    """A step of fine-tuning is one program.

    Raises:
        InputError: the mesh does not divide the rows.
    """
    over = int(np.prod([mesh.shape[axis] for axis in ROWS]))
    if config.batch % (over * config.accumulate):
        raise InputError(
            f"batch: {config.batch} rows are not divided by {over} parts of the mesh"
            + (f" times accumulate {config.accumulate}" if config.accumulate > 1 else "")
        )
    state, step, _ = sft_program(config, model, mesh, config.steps or STEPS)
    batch = _batch(config, model, bucket, mesh, config.batch)
    return (Phase("sft", step, (state, *batch), _always(state, batch)),)


def grpo_phases(config: GrpoConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh) -> tuple[Phase, ...]:
    """The phases of a step of GRPO in the order of `train/run_grpo.py`, and what lies beside each:

    - always: parameters, moments, the reference's own parameters, this batch and the next;
    - the encoded clips: from `encode` until the update is done, which reads them again;
    - the sampler's view: from `view` to the end of the rollout. Held-out evaluation holds it over all its batches,
      so that there clips are encoded beside it and the clips before them;
    - captions, their log-probabilities, scores and advantages: from the rollout and the scores until the update.

    The caches of clips and captions, gathered weights and gradients live and end inside their program: the compiler
    counts them. A phase that the config does without (encoders that are trained, no scores to take) is not there.

    Raises:
        InputError: the config does not hold together, or the mesh does not divide the rows.
    """
    program = grpo_program(config, model, mesh, config.steps or STEPS, STOPS)
    rows = config.batch * config.split
    batch = _batch(config, model, bucket, mesh, rows)
    clip, weight, by_rows = batch[0], batch[2], rows_sharding(mesh)

    def made(run: Any, *args: Any) -> Any:
        return _placed(jax.eval_shape(run, *args), by_rows)

    with jax.set_mesh(mesh):
        params = program.state.params
        encoded = program.encode and made(program.encode, params, clip)
        view = jax.eval_shape(program.view, params)
        view = jax.tree.map(_as, view, shardings(view, mesh, over=VIEW_OVER))
        banned = jax.ShapeDtypeStruct((model.text.vocab,), jnp.bool_)
        sampling = view, clip, encoded, jax.ShapeDtypeStruct((), jnp.int32), banned
        rollout = made(program.roll_out, *sampling)
        reference = program.reference if config.objective.beta else {}
        scoring = params, reference, clip, encoded, rollout.captions
        scored = made(program.score, *scoring)
    advantage = _as(jax.ShapeDtypeStruct(rollout.lengths.shape, jnp.float32), by_rows)
    experience = Experience(clip, encoded, rollout, scored, advantage, weight)

    always = _always(program.state, batch) | {"reference": reference}
    after = always | {"encoded": encoded}
    evaluated = after | {"view": view} if config.data.heldout else always
    phases = (
        Phase("encode", program.encode, (params, clip), evaluated),
        Phase("view", program.view, (params,), after),
        Phase("rollout", program.roll_out, sampling, after | {"view": view}),
        Phase("score", program.score, scoring, after | {"captions": rollout}),
        Phase("update", program.update, (program.state, experience), after | {"captions": (rollout, scored)}),
    )
    without = ("encode",) * (encoded is None) + ("score",) * (not jax.tree.leaves(scored))
    return tuple(phase for phase in phases if phase.name not in without)


def _batch(config: RunConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh, rows: int) -> tuple[Any, ...]:
    """What `parallel.batches` puts of a batch: clip, captions of the data, weight, tokens cut."""
    shapes = example(model, rows, config.data.references, tuple(bucket.shape), config.data.caption_tokens)
    per_row = (jax.ShapeDtypeStruct((rows,), dtype) for dtype in (jnp.float32, jnp.int32))
    return _placed((*shapes, *per_row), rows_sharding(mesh))


def _always(state: State, batch: tuple[Any, ...]) -> dict[str, Any]:
    """What is there in every phase of every step. The next batch is put while this one is in use."""
    return {"parameters": state.params, "optimizer": state._replace(params=None), "inputs": (batch, batch)}


def _placed(shapes: Any, sharding: Any) -> Any:
    return jax.tree.map(lambda leaf: _as(leaf, sharding), shapes)


def _as(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

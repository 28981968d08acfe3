"""The programs of a training step in execution order, and the arrays that are alive beside each."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from avocado_jax.config import GrpoConfig, RunConfig, SftConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.parallel.compiled import Program
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.sampling.slots import slot_shapes
from avocado_jax.train.grpo import grpo_program
from avocado_jax.train.programs import batch_shapes, heldout_rows, learning_programs, sampling_programs, step_shapes
from avocado_jax.train.sft import sft_program
from avocado_jax.train.spares import replacement, replacement_shapes
from avocado_jax.train.state import State

STOPS = (0, 1)  # any stop ids: they do not change memory or FLOPs
STEPS = 1000  # where the config does not set them: they only enter the schedule


class Phase(NamedTuple):
    """One jitted program and its arguments as ShapeDtypeStructs with shardings.

    Attributes:
        alive: arrays on the devices while the program runs, its arguments included, by name.
    """

    name: str
    run: Any
    args: tuple[Any, ...]
    alive: dict[str, Any]

    def lower(self, mesh: Mesh) -> jax.stages.Lowered:
        """Trace and lower the program for the devices of the mesh."""
        with jax.set_mesh(mesh):
            return self.run.lower(*self.args)


def sft_phases(config: SftConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh) -> tuple[Phase, ...]:
    """The single program of an SFT step.

    Raises:
        InputError: the mesh does not divide the rows.
    """
    shards = int(np.prod([mesh.shape[axis] for axis in ROWS]))
    if config.batch % (shards * config.accumulate):
        raise InputError(
            f"batch: {config.batch} rows are not divided by {shards} parts of the mesh"
            + (f" times accumulate {config.accumulate}" if config.accumulate > 1 else "")
        )
    state, step, _ = sft_program(config, model, mesh, config.steps or STEPS)
    batch = _batch(config, model, bucket, mesh, config.batch)
    return (Phase("sft", step, (state, *batch), _always(state, batch)),)


def grpo_phases(config: GrpoConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh) -> tuple[Phase, ...]:
    """The programs of a GRPO step in the order of `train/run_grpo.py`, with the arrays that are alive beside each:

    - always: parameters, optimizer state, the reference's parameters, the batches of a rollout and the next batch;
    - encoded clips: from `encode` to the end of `update`;
    - the sampler's view of the parameters: during `rollout`. Held-out evaluation keeps it over all its batches, so
      there it is alive during `encode` too, beside the encoded clips of the previous batch;
    - captions, log-probabilities, scores and advantages: from `rollout` and `score` to the end of `update`; with
      several batches per rollout also from each rollout to the next, in the state;
    - spare clips, their encodings and captions: to the last update of their rollout; a batch in which they have
      replaced others, from `spares` to the end of its update.

    KV caches, gathered weights and gradients exist only inside a program; the compiler accounts for them. `encode` is
    absent if the encoders are trained, `score` if nothing is scored, `spares` without `oversample`.

    Raises:
        InputError: the config is inconsistent, or the mesh does not divide the rows.
    """
    program = grpo_program(config, model, mesh, config.steps or STEPS * config.rollout_batches, STOPS)
    with jax.set_mesh(mesh):
        shapes = step_shapes(config, model, program, bucket, mesh)
        sampling = sampling_programs(config, model, program, shapes)
        learning = learning_programs(config, program, shapes, mesh, config.sampling.tokens)
    encoded, view, rollout = shapes.encoded, shapes.view, shapes.rollout
    scored = learning["update"].args[1].scored
    batch = _batch(config, model, bucket, mesh, config.batch * config.split)
    reference = program.reference if config.objective.beta else {}

    together = config.rollout_batches + config.oversample // config.batch
    always = _always(program.state, batch, together) | {"reference": reference}
    after, rollouts = always | {"encoded": (encoded,) * together}, (rollout,) * together
    evaluated = always
    if config.data.heldout:
        length = min(config.eval_tokens, config.sampling.tokens)
        slots = slot_shapes(program.sampler, program.sampler_mesh, bucket.shape.tokens, heldout_rows(config), length)
        evaluated = after | {"view": view, "slots": slots}
    if config.rollout_batches > 1:  # the last batch of a rollout, or held-out clips between its updates
        count = together + 1 if config.data.heldout else together - 1
        evaluated |= {"encoded": (encoded,) * count, "captions": rollouts}
    kept = {"captions": rollouts} if config.rollout_batches > 1 else {}
    alive = {
        "encode": evaluated,
        "view": after | kept,
        "rollout": after | kept | {"view": view},
        "score": after | {"captions": (kept, rollouts, rollouts)},  # at their full width, and cropped
        "update": after | {"captions": (kept, rollouts, rollouts, (scored,) * together)},
    }
    if config.oversample:
        args = replacement_shapes(config, shapes, mesh)
        sampling["spares"] = Program("spares", replacement(mesh), args)
        alive["spares"] = after | {"captions": (kept, rollouts, rollouts)}
        alive["score"] = alive["spares"] | {"replaced": (args[0], rollout)}  # at its full width, and cropped
        alive["update"] = alive["score"] | {"scores": scored}
    phases = tuple(Phase(name, run, args, alive[name]) for name, (_, run, args) in (sampling | learning).items())
    return tuple(phase for phase in phases if phase.name != "score" or jax.tree.leaves(scored))


def _batch(config: RunConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh, rows: int) -> tuple[Any, ...]:
    """The arrays of a batch on the mesh, with captions of the greatest length."""
    return batch_shapes(config, model, bucket._replace(caption=config.data.caption_tokens), mesh, rows)


def _always(state: State, batch: tuple[Any, ...], together: int = 1) -> dict[str, Any]:
    """Arrays that are alive in every phase. The next batch is transferred while `together` are in use."""
    inputs = (batch,) * (together + 1)
    return {"parameters": state.params, "optimizer": state._replace(params=None), "inputs": inputs}

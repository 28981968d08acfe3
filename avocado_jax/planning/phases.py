"""The programs that a step runs one after the other, and what lies on the devices beside each."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from avocado_jax.config import GrpoConfig, RunConfig, SftConfig
from avocado_jax.data.plan import Bucket
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.train.grpo import grpo_program
from avocado_jax.train.programs import batch_shapes, learning_programs, sampling_programs, step_shapes
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
    with jax.set_mesh(mesh):
        shapes = step_shapes(config, model, program, bucket, mesh)
        sampling = sampling_programs(model, program, shapes)
        learning = learning_programs(config, program, shapes, mesh, config.sampling.tokens)
    encoded, view, rollout = shapes.encoded, shapes.view, shapes.rollout
    scored = learning["update"].args[1].scored
    batch = _batch(config, model, bucket, mesh, config.batch * config.split)
    reference = program.reference if config.objective.beta else {}

    always = _always(program.state, batch) | {"reference": reference}
    after = always | {"encoded": encoded}
    evaluated = after | {"view": view} if config.data.heldout else always
    alive = {
        "encode": evaluated,
        "view": after,
        "rollout": after | {"view": view},
        "score": after | {"captions": rollout},
        "update": after | {"captions": (rollout, scored)},
    }
    phases = tuple(Phase(name, run, args, alive[name]) for name, (_, run, args) in (sampling | learning).items())
    return tuple(phase for phase in phases if phase.name != "score" or jax.tree.leaves(scored))


def _batch(config: RunConfig, model: ThinkerConfig, bucket: Bucket, mesh: Mesh, rows: int) -> tuple[Any, ...]:
    """What `parallel.batches` puts of a batch: clip, captions of the data, weight, tokens cut."""
    return batch_shapes(config, model, bucket._replace(caption=config.data.caption_tokens), mesh, rows)


def _always(state: State, batch: tuple[Any, ...]) -> dict[str, Any]:
    """What is there in every phase of every step. The next batch is put while this one is in use."""
    return {"parameters": state.params, "optimizer": state._replace(params=None), "inputs": (batch, batch)}

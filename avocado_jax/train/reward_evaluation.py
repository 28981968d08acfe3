"""Held-out evaluation of GRPO: the rewards of greedy captions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig
from avocado_jax.data.pipeline import Batch
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.sampling.batch import Captioning, batch_programs, caption_batch
from avocado_jax.sampling.generate import Samples
from avocado_jax.train.grpo import GrpoProgram
from avocado_jax.train.programs import batch_shapes, by_rows, view_shapes
from avocado_jax.train.rewards import Rewards
from avocado_jax.train.rollout import Rollout, as_rollout
from avocado_jax.train.run import Evaluator, Measured, Setup, agreement_programs, heldout, heldout_means
from avocado_jax.train.state import State
from avocado_jax.typing import Array, Clip


def reward_evaluator(
    config: GrpoConfig, setup: Setup, program: GrpoProgram, rewards: Rewards, banned: Array, stops: tuple[int, ...]
) -> Evaluator:
    """Mean rewards of greedy captions of the first `eval_rows` held-out clips."""
    if not config.data.heldout:
        return Evaluator()
    mesh, evaluated = setup.mesh, heldout(config, setup)
    rows = evaluated.plan.batch
    how = Captioning(
        config=program.sampler,
        mesh=program.sampler_mesh,
        stops=stops,
        length=min(config.eval_tokens, config.sampling.tokens),
        parts=rows // (config.batch * config.split),  # as many rows are prefilled together as in a training step
    )
    totals = jax.jit(partial(heldout_totals, rewards))

    @partial(jax.jit, out_shardings=rows_sharding(mesh))
    def held_out_rollout(tokens: Array, lengths: Array, clip: Clip) -> Rollout:
        """The captions of slots, as long as those of a training step."""
        written = jnp.arange(how.length)[None] < lengths[:, None]
        tokens = jnp.where(written, tokens, stops[0])
        tokens = jnp.pad(tokens, ((0, 0), (0, config.sampling.tokens - how.length)), constant_values=stops[0])
        return as_rollout(Samples(tokens[:, None], jnp.zeros(tokens[:, None].shape), lengths[:, None]), clip, stops)

    def evaluate(state: State, step: int) -> dict[str, Any]:
        view, encode = program.view(state.params), program.encode and partial(program.encode, state.params)

        def measure(batch: Batch) -> Measured:
            slots = caption_batch(view, batch.clip, batch.weight, encode, banned, how)
            rollout = held_out_rollout(slots.tokens, slots.step, batch.clip)
            judged = rewards.judge(rollout, batch)()
            with jax.debug_nans(False):  # a term without a reference is NaN
                terms = rewards.terms(rollout, batch.references, judged)
            part = totals(terms, rollout.lengths, batch.weight)
            rewards.check(judged)
            return part

        return heldout_means(config, evaluated, measure, rewards.references)

    params, view = program.state.params, view_shapes(program)
    every_id = jax.ShapeDtypeStruct(banned.shape, banned.dtype, sharding=NamedSharding(mesh, PartitionSpec()))
    replicated = NamedSharding(program.sampler_mesh, PartitionSpec())  # as slots are
    tokens, lengths = (
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=replicated) for shape in ((rows, how.length), (rows,))
    )
    found = agreement_programs(evaluated, evaluated.plan.buckets, rewards.references)
    for bucket in evaluated.plan.buckets:
        clip, _, weight, _ = batch_shapes(config, setup.model, bucket, mesh, rows)
        encoded = None
        if program.encode:
            part = batch_shapes(config, setup.model, bucket, mesh, rows // how.parts)[0]
            encoded = by_rows(jax.eval_shape(program.encode, params, part), mesh)
            found.append(Program("held-out encode", program.encode, (params, part)))
        found += batch_programs(view, clip, weight, encoded, every_id, how)
        rollout = by_rows(jax.eval_shape(held_out_rollout, tokens, lengths, clip), mesh)
        found.append(Program("held-out captions", held_out_rollout, (tokens, lengths, clip)))
    scoring = rewards.program(rollout)
    terms = by_rows(jax.eval_shape(scoring.run, *scoring.args), mesh)
    found += [scoring, Program("held-out sums", totals, (terms, rollout.lengths, weight))]
    return Evaluator(evaluate, rank_by_reward, found)


def rank_by_reward(entries: dict[str, Any]) -> float | None:
    """The best checkpoint has the highest held-out reward."""
    return -entries["heldout_reward"] if "heldout_reward" in entries else None


def heldout_totals(rewards: Rewards, terms: dict[str, Array], lengths: Array, weight: Array) -> Measured:
    """Sums of the reward, its terms and the lengths over the captions that count, and their numbers.

    The reward is the weighted sum of the terms, never normalised: a caption has no group to compare it with.
    """
    reward, _ = rewards.combine(terms, weight, normalize=False)
    measured = {f"reward_{name}": value for name, value in terms.items()}
    measured |= {"reward": reward, "length": lengths.astype(jnp.float32)}
    known = {name: jnp.isfinite(value) & (weight > 0)[:, None] for name, value in measured.items()}
    return {name: (jnp.sum(value, where=known[name]), jnp.sum(known[name])) for name, value in measured.items()}

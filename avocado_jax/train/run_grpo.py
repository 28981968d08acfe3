"""From a config to a GRPO run: rollouts, rewards, updates, and the files written for each step."""

import json
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.checkpoint.load import load_sharded
from avocado_jax.checkpoint.training import Checkpoints
from avocado_jax.config import GrpoConfig
from avocado_jax.data import storage
from avocado_jax.data.pipeline import Batch
from avocado_jax.data.plan import Bucket
from avocado_jax.models.config import computed
from avocado_jax.models.flops import grpo_flops
from avocado_jax.models.thinker import Encoded
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.rewards.combine import TERMS
from avocado_jax.rewards.extra import load_terms
from avocado_jax.sampling.batch import Captioning, batch_programs, caption_batch
from avocado_jax.sampling.captioner import banned_ids
from avocado_jax.sampling.generate import Samples
from avocado_jax.train.grpo import Experience, GrpoProgram, Scored, grpo_program
from avocado_jax.train.health import Health, describe
from avocado_jax.train.objective import advantages, zero_variance
from avocado_jax.train.phases import Phases
from avocado_jax.train.programs import (
    StepShapes,
    batch_shapes,
    by_rows,
    learning_programs,
    sampling_programs,
    step_shapes,
    view_shapes,
    with_sharding,
)
from avocado_jax.train.rewards import Judged, Rewards, caption_text, open_rewards
from avocado_jax.train.rollout import Rollout, as_rollout, cut, fitting, widths
from avocado_jax.train.run import (
    Evaluator,
    Measured,
    Setup,
    agreement_programs,
    heldout,
    heldout_means,
    open_folder,
    restored,
    run,
    set_up,
    stream,
)
from avocado_jax.train.startup import ready
from avocado_jax.train.state import State
from avocado_jax.typing import Array, Clip


def grpo(config: GrpoConfig, folder: str) -> int:
    """Start, resume or finish the run in `folder` (local or gs://). Returns its exit status.

    Raises:
        InputError: the config is inconsistent, or the folder holds a run of another config.
    """

    def opened() -> Setup:
        load_terms(config.rewards.extra, TERMS)  # a mistake is reported before hosts wait for each other
        return set_up(config, config.split, folder)

    setup = ready(config, folder, opened)
    mesh, model = setup.mesh, setup.model
    stops = stop_ids(setup.checkpoint.side_files, setup.words, model.text.vocab)
    with jax.set_mesh(mesh), open_rewards(config, setup, stops) as rewards:
        program = grpo_program(config, model, mesh, setup.steps, stops)
        open_folder(config, model, folder, setup.recipe.reading)
        checkpoints = Checkpoints(folder, config.keep)
        state = restored(config, setup, folder, checkpoints, *_with_rollouts(config, setup, program))
        # The reference policy is the checkpoint `init`: every start reads it again, and it is never saved.
        reference = load_sharded(setup.checkpoint, program.reference, whole=False) if config.objective.beta else {}
        if jax.process_index() == 0 and int(state.step) < setup.steps:
            print(describe(config, model, setup.plan.buckets[0]), file=sys.stderr)
        banned = jnp.asarray(banned_ids(model, setup.words, stops))
        updates = config.passes * config.minibatches

        def flops(batch: Batch, metrics: dict[str, float]) -> float:
            shape, length, beta = batch.bucket.shape, metrics["length"], config.objective.beta > 0
            row = sum(grpo_flops(model, shape, config.group, length, config.train, updates, beta))
            return config.batch * row * (1 - batch.padded)

        def batches(first: int) -> Iterator[Batch]:
            return blocks(stream(setup, config, first, rewards.references), first, config.rollout_batches)

        step, step_programs = _step(config, setup, program, rewards, reference, banned, stops, folder)
        evaluator = _evaluator(config, setup, program, rewards, banned, stops)

        def programs(buckets: list[Bucket]) -> list[Program]:
            found = agreement_programs(setup, buckets, rewards.references)
            for shapes in shapes_of(config, setup, program, buckets):
                found += sampling_programs(config, model, program, shapes).values()
                for width in widths(config.sampling.tokens):
                    found += learning_programs(config, program, shapes, mesh, width).values()
            return found + step_programs(shapes)

        return run(
            config,
            setup,
            folder,
            checkpoints,
            state,
            programs,
            evaluator,
            batches=batches,
            step=step,
            flops=flops,
        )


def _with_rollouts(config: GrpoConfig, setup: Setup, program: GrpoProgram) -> tuple[State, Callable]:
    """Shapes of the state, and the function that creates it from parameters.

    With several batches per rollout the state includes their rollouts, since a resume cannot sample them again: the
    policy has changed.
    """
    if config.rollout_batches == 1:
        return program.state, program.begin
    (shapes,) = shapes_of(config, setup, program, setup.plan.buckets[:1])  # rollouts have one shape in all buckets
    rollouts = (shapes.rollout,) * config.rollout_batches

    @partial(jax.jit, out_shardings=rows_sharding(setup.mesh))
    def empty() -> tuple[Rollout, ...]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), rollouts)

    def begin(params: Any) -> State:
        return program.begin(params)._replace(rollouts=empty())

    return program.state._replace(rollouts=rollouts), begin


def blocks(batches: Iterator[Batch], first: int, size: int) -> Iterator[Batch]:
    """The batches in order; the first of each rollout, and the first of all, has the others of its rollout too.

    Args:
        first: step of the first batch.
        size: batches of a rollout, which begins at a multiple of it.
    """
    with closing(batches):
        while block := list(islice(batches, size - first % size)):
            first += len(block)
            yield block.pop(0)._replace(following=tuple(block))
            while block:  # this holds no batch that was yielded, so that its arrays can be freed
                yield block.pop(0)


def shapes_of(config: GrpoConfig, setup: Setup, program: GrpoProgram, buckets: Iterable[Bucket]) -> list[StepShapes]:
    """The shapes of a step on each bucket."""
    return [step_shapes(config, setup.model, program, bucket, setup.mesh) for bucket in buckets]


class _Part(NamedTuple):
    """A batch with its rollout, while the rewards are computed."""

    batch: Batch
    encoded: Encoded | None
    rollout: Rollout
    cropped: Rollout  # at the width of its longest caption
    answers: Callable[[], Judged | None]  # waits for the judge
    scored: Scored | None  # None until the batch's turn, if it depends on the policy of that time


def _step(
    config: GrpoConfig,
    setup: Setup,
    program: GrpoProgram,
    rewards: Rewards,
    reference: Any,
    banned: Array,
    stops: tuple[int, ...],
    folder: str,
) -> tuple[Callable, Callable[[StepShapes], list[Program]]]:
    """The step function of `train.loop.Job`, and those of its programs that every bucket shares.

    All phases but the rollout are dispatched without waiting for their results: the length of the longest caption
    selects the width at which captions are scored and learned from. The judge receives all captions of a rollout at
    once, so that it answers while the devices learn from earlier batches.
    """
    phases, health = Phases(), Health()
    replicated, by_row = NamedSharding(setup.mesh, PartitionSpec()), rows_sharding(setup.mesh)

    def by_clip(tree: Any) -> Any:
        """[rows, group / split, ...] as [clips, group, ...]."""
        return jax.tree.map(lambda leaf: leaf.reshape(config.batch, config.group, *leaf.shape[2:]), tree)

    @partial(jax.jit, out_shardings=(replicated, by_row, replicated))
    def group_advantages(terms: dict[str, Array], weight: Array) -> tuple[Array, Array, dict[str, Array]]:
        """Rewards [clips, group], advantages by row, and metrics."""
        weight = weight[:: config.split]  # all rows of a clip have the same weight (`agreed_batches`)
        reward, of_terms = rewards.combine(by_clip(terms), weight)
        clips = jnp.maximum(jnp.sum(weight), 1)
        metrics = {
            "reward": jnp.sum(jnp.mean(reward, axis=1) * weight) / clips,
            "reward_std": jnp.sum(jnp.std(reward, axis=1) * weight) / clips,
            "zero_variance": jnp.sum(zero_variance(reward) * weight) / clips,
        }
        advantage = advantages(reward, config.objective).reshape(-1, config.group // config.split)
        return reward, advantage, metrics | {f"reward_{name}": value for name, value in of_terms.items()}

    gather = jax.jit(lambda rows, reward: (*by_clip(rows), reward), out_shardings=replicated)
    longest = jax.jit(jnp.max, out_shardings=replicated)
    narrow = jax.jit(cut, static_argnums=1, out_shardings=by_row)

    def programs(shapes: StepShapes) -> list[Program]:
        rollout, weight = shapes.rollout, shapes.batch[2]
        scoring = rewards.program(rollout)
        terms = by_rows(jax.eval_shape(scoring.run, *scoring.args), setup.mesh)
        reward, advantage, _ = jax.eval_shape(group_advantages, terms, weight)
        written = rollout.captions.targets, rollout.lengths, terms, with_sharding(advantage, by_row)
        several = config.rollout_batches > 1
        return [
            scoring,
            *([Program("rows of the rollout", agree_with_rollout, (rollout, weight))] if several else []),
            Program("advantages", group_advantages, (terms, weight)),
            Program("the longest caption", longest, (rollout.lengths,)),
            Program("the rollout's lines", gather, (written, with_sharding(reward, replicated))),
            *(Program("the cut", narrow, (rollout, width)) for width in widths(config.sampling.tokens)),
        ]

    @partial(jax.jit, out_shardings=by_row)
    def agree_with_rollout(rollout: Rollout, weight: Array) -> tuple[Rollout, Array]:
        """A row whose record was lost when its captions were sampled has none, and does not count after a resume."""
        rollout = rollout._replace(lengths=rollout.lengths * (weight > 0)[:, None])
        return rollout, weight * (jnp.max(rollout.lengths, axis=1) > 0)

    parts: deque[_Part] = deque()  # of the newest rollout: those that the policy has not learned from

    def rolled_out(state: State, batches: tuple[Batch, ...]) -> tuple[Rollout, ...]:
        """Sample the captions of some batches, or take them from the state after a resume. Fills `parts`."""
        clips = tuple(batch.clip for batch in batches)
        encoded = tuple(program.encode and program.encode(state.params, clip) for clip in clips)
        if batches[0].step % config.rollout_batches == 0:
            rollouts = program.roll_out(program.view(state.params), clips, encoded, state.step, banned)
            phases.end("rollout", [rollout.lengths for rollout in rollouts])
        else:
            rollouts = state.rollouts
        if config.rollout_batches > 1:
            finished = config.rollout_batches - len(batches)
            agreed = [agree_with_rollout(*each) for each in zip(rollouts[finished:], (one.weight for one in batches))]
            rollouts = (*rollouts[:finished], *(rollout for rollout, _ in agreed))
            batches = tuple(batch._replace(weight=weight) for batch, (_, weight) in zip(batches, agreed))
        for batch, *each in zip(batches, encoded, rollouts[-len(batches) :], strict=True):
            parts.append(start_rewards(state, batch, *each))
        return rollouts

    def start_rewards(state: State, batch: Batch, encoded: Encoded | None, rollout: Rollout) -> _Part:
        cropped = narrow(rollout, fitting(int(longest(rollout.lengths)), config.sampling.tokens))
        part = _Part(batch, encoded, rollout, cropped, rewards.judge(rollout, batch), None)
        return part._replace(scored=score(state, part)) if config.passes * config.minibatches == 1 else part

    def score(state: State, part: _Part) -> Scored:
        scored = program.score(state.params, reference, part.batch.clip, part.encoded, part.cropped.captions)
        phases.end("score", scored)
        return scored

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array], Callable[[], dict[str, Any]]]:
        phases.begin()
        rollouts = state.rollouts
        if not parts:
            rollouts = rolled_out(state, (batch, *batch.following))
        part = parts.popleft()
        if part.scored is None:
            part = part._replace(scored=score(state, part))
        batch, encoded, rollout, cropped, answers, scored = part
        del part
        judged = answers()  # the devices work while the host waits for a remote judge
        if judged:
            phases.idle("judge_wait")
        with jax.debug_nans(False):  # a term without a reference is NaN
            terms = rewards.terms(rollout, batch.references, judged)
            reward, advantage, reward_metrics = group_advantages(terms, batch.weight)
        phases.end("reward", advantage)
        experience = Experience(batch.clip, encoded, cropped, scored, advantage, batch.weight)
        state, metrics = program.update(state._replace(rollouts=()), experience)
        phases.end("update", metrics)
        number, stale = batch.step, batch.step % config.rollout_batches
        if config.rollout_batches > 1:
            state = state._replace(rollouts=rollouts)
            metrics |= {"staleness": np.int32(stale)}
        with jax.debug_nans(False):
            written = gather((rollout.captions.targets, rollout.lengths, terms, advantage), reward)
        seconds = phases.step()
        rewards.check(judged)  # after the update is dispatched, so that the devices need not wait for the host

        def finish() -> dict[str, Any]:
            values = jax.device_get(metrics | reward_metrics)
            health.check(number + 1, {name: float(value) for name, value in values.items()}, stale > 0)
            lines = _lines(setup, stops, number, *jax.device_get(written))
            if jax.process_index() == 0:
                storage.write(storage.join(folder, f"rollouts/{number + 1}.jsonl"), "".join(lines).encode())
            return {f"{name}_seconds": round(one.result(), 4) for name, one in seconds.items()}

        return state, metrics | reward_metrics, finish

    return step, programs


def _lines(
    setup: Setup,
    stops: tuple[int, ...],
    step: int,
    tokens: np.ndarray,
    lengths: np.ndarray,
    terms: dict,
    advantage: np.ndarray,
    reward: np.ndarray,
) -> Iterator[str]:
    """A JSON line for each caption of a step, in order."""
    for row, record in enumerate(setup.plan.step(step).records):
        for caption in range(lengths.shape[1] if record >= 0 else 0):
            at = row, caption
            ids = tokens[at][: lengths[at]].tolist()
            line = {
                "step": step + 1,
                "id": setup.source.index.ids[record],
                "group": caption,
                "caption": caption_text(setup, stops, ids),
                "token_ids": ids,
                "length": int(lengths[at]),
                "rewards": {name: _number(value[at]) for name, value in terms.items()},
                "reward": _number(reward[at]),
                "advantage": _number(advantage[at]),
            }
            yield json.dumps(line, ensure_ascii=False) + "\n"


def _number(value: np.floating) -> float | None:
    """None for NaN (a term without a reference), which JSON cannot represent."""
    return float(value) if np.isfinite(value) else None


def _evaluator(
    config: GrpoConfig, setup: Setup, program: GrpoProgram, rewards: Rewards, banned: Array, stops: tuple[int, ...]
) -> Evaluator:
    """Mean rewards of greedy captions of the first `eval_rows` held-out clips."""
    if not config.data.heldout:
        return Evaluator()
    mesh, evaluated = setup.mesh, heldout(config, setup)
    rows = evaluated.plan.batch
    how = Captioning(
        config=computed(setup.model, setup.model.dtype, scan=False),
        mesh=mesh,
        stops=stops,
        length=min(config.eval_tokens, config.sampling.tokens),
        parts=rows // (config.batch * config.split),  # as many rows are prefilled together as in a training step
    )
    sums = jax.jit(partial(heldout_sums, rewards))

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
            part = sums(terms, rollout.lengths, batch.weight)
            rewards.check(judged)
            return part

        return heldout_means(config, evaluated, measure, rewards.references)

    params, view, replicated = program.state.params, view_shapes(program, mesh), NamedSharding(mesh, PartitionSpec())
    every_id = jax.ShapeDtypeStruct(banned.shape, banned.dtype, sharding=replicated)
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
    found += [scoring, Program("held-out sums", sums, (terms, rollout.lengths, weight))]
    return Evaluator(evaluate, rank_by_reward, found)


def rank_by_reward(entries: dict[str, Any]) -> float | None:
    """The best checkpoint has the highest held-out reward."""
    return -entries["heldout_reward"] if "heldout_reward" in entries else None


def heldout_sums(rewards: Rewards, terms: dict[str, Array], lengths: Array, weight: Array) -> Measured:
    """Sums of the reward, its terms and the lengths over the captions that count, and their numbers.

    The reward is the weighted sum of the terms, never normalised: a caption has no group to compare it with.
    """
    reward, _ = rewards.combine(terms, weight, normalize=False)
    measured = {f"reward_{name}": value for name, value in terms.items()}
    measured |= {"reward": reward, "length": lengths.astype(jnp.float32)}
    known = {name: jnp.isfinite(value) & (weight > 0)[:, None] for name, value in measured.items()}
    return {name: (jnp.sum(value, where=known[name]), jnp.sum(known[name])) for name, value in measured.items()}

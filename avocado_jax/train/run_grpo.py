"""From a config to a GRPO run: rollouts, rewards, updates, and the files written for each step."""

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
from avocado_jax.models.flops import grpo_flops
from avocado_jax.models.thinker import Encoded
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.rewards.combine import TERMS
from avocado_jax.rewards.extra import load_terms
from avocado_jax.sampling.captioner import banned_ids
from avocado_jax.train.grpo import Experience, GrpoProgram, Scored, check_grpo, grpo_program
from avocado_jax.train.health import Health, describe
from avocado_jax.train.objective import advantages, zero_variance
from avocado_jax.train.phases import Phases
from avocado_jax.train.programs import (
    StepShapes,
    by_rows,
    learning_programs,
    sampling_programs,
    step_shapes,
    with_sharding,
)
from avocado_jax.train.reward_evaluation import reward_evaluator
from avocado_jax.train.rewards import Answers, Rewards, open_rewards
from avocado_jax.train.rollout import Rollout, crop, smallest_width, widths
from avocado_jax.train.rollout_lines import rollout_lines
from avocado_jax.train.run import (
    Setup,
    agreement_programs,
    open_folder,
    restored,
    run,
    set_up,
    stream,
)
from avocado_jax.train.spares import Sampled, replacement, replacement_shapes
from avocado_jax.train.startup import ready
from avocado_jax.train.state import State
from avocado_jax.typing import Array, Clip


def grpo(config: GrpoConfig, folder: str) -> int:
    """Start, resume or finish the run in `folder` (local or gs://). Returns its exit status.

    Raises:
        InputError: the config is inconsistent, or the folder holds a run of another config.
    """

    def opened() -> Setup:
        check_grpo(config)  # a mistake is reported before hosts wait for each other
        load_terms(config.rewards.extra, TERMS)
        return set_up(config, config.split, folder)

    setup = ready(config, folder, opened)
    mesh, model = setup.mesh, setup.model
    stops = stop_ids(setup.checkpoint.config_folder, setup.words, model.text.vocab)
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
            read = stream(setup, config, first, rewards.references)
            return blocks(read, first, config.rollout_batches, setup.plan.spares)

        step, step_programs = _step(config, setup, program, rewards, reference, banned, stops, folder)
        evaluator = reward_evaluator(config, setup, program, rewards, banned, stops)

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
    policy has changed. It also includes which of the spare clips have replaced others.
    """
    if config.rollout_batches == 1:
        return program.state, program.begin
    (shapes,) = shapes_of(config, setup, program, setup.plan.buckets[:1])  # rollouts have one shape in all buckets
    spares = config.oversample // config.batch
    rollouts, spent = (shapes.rollout,) * (config.rollout_batches + spares), ()
    if spares:
        everywhere = NamedSharding(setup.mesh, PartitionSpec())
        spent = jax.ShapeDtypeStruct((config.oversample,), jnp.bool_, sharding=everywhere)
    kept = {"rollouts": rollouts, "spent": spent}

    @partial(jax.jit, out_shardings=jax.tree.map(lambda leaf: leaf.sharding, kept))
    def empty() -> dict[str, Any]:
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), kept)

    def begin(params: Any) -> State:
        return program.begin(params)._replace(**empty())

    return program.state._replace(**kept), begin


def blocks(batches: Iterator[Batch], first: int, size: int, spares: int = 0) -> Iterator[Batch]:
    """The batches in order; the first of each rollout, and the first of all, has the others of its rollout too.

    Args:
        first: step of the first batch.
        size: batches of a rollout, which begins at a multiple of it.
        spares: batches behind these, without a step.
    """
    with closing(batches):
        while block := list(islice(batches, size - first % size + spares)):
            extra = tuple(block.pop() for _ in range(spares))[::-1]
            block = [batch._replace(step=first + number) for number, batch in enumerate(block)]
            first += len(block)
            yield block.pop(0)._replace(following=tuple(block), spares=extra)
            del extra
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
    answers: Callable[[], Answers]  # waits for the judge
    scored: Scored | None  # None until the batch's turn, if it depends on the policy of that time, or on spare clips


class _Rewarded(NamedTuple):
    """A batch with its rewards."""

    sampled: Sampled
    reward: Array
    metrics: dict[str, Array]
    written: tuple[Any, ...]  # arguments of `rollout_lines`
    judged: Answers


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
    narrow = jax.jit(crop, static_argnums=1, out_shardings=by_row)

    def programs(shapes: StepShapes) -> list[Program]:
        rollout, weight = shapes.rollout, shapes.batch[2]
        scoring = rewards.program(rollout)
        terms = by_rows(jax.eval_shape(scoring.run, *scoring.args), setup.mesh)
        reward, advantage, _ = jax.eval_shape(group_advantages, terms, weight)
        written = rollout.captions.targets, rollout.lengths, terms, with_sharding(advantage, by_row)
        several, replacing = config.rollout_batches > 1, replacement_shapes(config, shapes, setup.mesh)
        return [
            scoring,
            *([Program("rows of the rollout", agree_with_rollout, (rollout, weight))] if several else []),
            Program("advantages", group_advantages, (terms, weight)),
            Program("the longest caption", longest, (rollout.lengths,)),
            Program("the rollout's lines", gather, (written, with_sharding(reward, replicated))),
            *(Program("the cut", narrow, (rollout, width)) for width in widths(config.sampling.tokens)),
            *([Program("spare clips", replaced, replacing)] if config.oversample else []),
        ]

    @partial(jax.jit, out_shardings=by_row)
    def agree_with_rollout(rollout: Rollout, weight: Array) -> tuple[Rollout, Array]:
        """A row whose record was lost when its captions were sampled has none, and does not count after a resume."""
        rollout = rollout._replace(lengths=rollout.lengths * (weight > 0)[:, None])
        return rollout, weight * (jnp.max(rollout.lengths, axis=1) > 0)

    parts: deque[_Part] = deque()  # of the newest rollout: those that the policy has not learned from
    extra: list[_Part] = []  # its spare batches
    spares: list[_Rewarded] = []  # the same with their rewards, from its first step on
    unspent, replaced = (), replacement(setup.mesh)
    if config.oversample:
        zeros = np.zeros(config.oversample, bool)
        unspent = jax.make_array_from_callback(zeros.shape, replicated, lambda index: zeros[index])

    def rolled_out(state: State, batches: tuple[Batch, ...], spare: tuple[Batch, ...]) -> tuple[Rollout, ...]:
        """Sample captions, or take them from the state after a resume. Fills `parts` and `extra`.

        Args:
            batches: those of the remaining steps of the rollout.
            spare: its spare batches.
        """
        steps, batches = len(batches), (*batches, *spare)
        clips = tuple(batch.clip for batch in batches)
        encoded = tuple(program.encode and program.encode(state.params, clip) for clip in clips)
        if batches[0].step % config.rollout_batches == 0:
            rollouts = program.roll_out(program.view(state.params), clips, encoded, state.step, banned)
            phases.end("rollout", [rollout.lengths for rollout in rollouts])
        else:
            rollouts = state.rollouts
        if config.rollout_batches > 1:
            finished = config.rollout_batches - steps
            agreed = [agree_with_rollout(*each) for each in zip(rollouts[finished:], (one.weight for one in batches))]
            rollouts = (*rollouts[:finished], *(rollout for rollout, _ in agreed))
            batches = tuple(batch._replace(weight=weight) for batch, (_, weight) in zip(batches, agreed))
        every = list(zip(batches, encoded, rollouts[-len(batches) :], strict=True))
        parts.append(start_rewards(state, *every[0]))
        extra.extend(start_rewards(state, *one) for one in every[steps:])  # needed with the first
        parts.extend(start_rewards(state, *one) for one in every[1:steps])
        return rollouts

    def start_rewards(state: State, batch: Batch, encoded: Encoded | None, rollout: Rollout) -> _Part:
        cropped = narrow(rollout, smallest_width(int(longest(rollout.lengths)), config.sampling.tokens))
        part = _Part(batch, encoded, rollout, cropped, rewards.judge(rollout, batch), None)
        known = config.passes * config.minibatches == 1 and not config.oversample
        return part._replace(scored=score(state, batch.clip, encoded, cropped)) if known else part

    def score(state: State, clip: Clip, encoded: Encoded | None, cropped: Rollout) -> Scored:
        scored = program.score(state.params, reference, clip, encoded, cropped.captions)
        phases.end("score", scored)
        return scored

    def rewarded(part: _Part) -> _Rewarded:
        """Wait for the judge and compute rewards and advantages."""
        batch, rollout, judged = part.batch, part.rollout, part.answers()  # meanwhile the devices work
        if judged:
            phases.idle("judge_wait")
        with jax.debug_nans(False):  # a term without a reference is NaN
            terms = rewards.terms(rollout, batch.references, judged)
            reward, advantage, metrics = group_advantages(terms, batch.weight)
            phases.end("reward", advantage)
            written = gather((rollout.captions.targets, rollout.lengths, terms, advantage), reward)
        sampled = Sampled(batch.clip, part.encoded, rollout, advantage, batch.weight)
        return _Rewarded(sampled, reward, metrics, written, judged)

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array], Callable[[], dict[str, Any]]]:
        phases.begin()
        number, stale = batch.step, batch.step % config.rollout_batches
        rollouts, spent = state.rollouts, state.spent if stale else unspent
        if not parts:
            rollouts = rolled_out(state, (batch, *batch.following), batch.spares)
        part = parts.popleft()
        if part.scored is None and not config.oversample:
            part = part._replace(scored=score(state, part.batch.clip, part.encoded, part.cropped))
        current, scored, cropped, judged, more = rewarded(part), part.scored, part.cropped, [], {}
        learned, written, taken = current.sampled, [current.written], np.zeros(0, bool)
        if config.oversample:
            if not spares:
                spares.extend(map(rewarded, extra))
                judged = [one.judged for one in spares]
            width = max(one.cropped.sampled.shape[-1] for one in (part, *extra))
            samples, spare_rewards = zip(*((one.sampled, one.reward) for one in spares))
            learned, taken, spent, more = replaced(learned, current.reward, samples, spare_rewards, spent)
            cropped = narrow(learned.rollout, width)
            scored = score(state, learned.clip, learned.encoded, cropped)
            written += [one.written for one in spares]
            if not parts:
                extra.clear()
                spares.clear()
        experience = Experience(learned.clip, learned.encoded, cropped, scored, learned.advantage, learned.weight)
        state, metrics = program.update(state._replace(rollouts=(), spent=()), experience)
        phases.end("update", metrics)
        if config.rollout_batches > 1:
            state = state._replace(rollouts=rollouts, spent=spent)
            metrics |= {"staleness": np.int32(stale)}
        metrics |= current.metrics | more
        seconds = phases.step()
        for one in (current.judged, *judged):  # after the update is dispatched, so that the devices need not wait
            rewards.check(one)

        def finish() -> dict[str, Any]:
            values = jax.device_get(metrics)
            health.check(number + 1, {name: float(value) for name, value in values.items()}, stale > 0)
            positions = [setup.plan.position(number), *setup.plan.spare_positions(number)]
            used = np.concatenate([np.full(config.batch, True), taken]).reshape(len(positions), config.batch)
            lines = []
            for position, of_clips, arrays in zip(positions, used, written, strict=True):
                records = np.where(of_clips, setup.plan.step(position).records, -1)
                lines += rollout_lines(setup, stops, number, records, *jax.device_get(arrays))
            if jax.process_index() == 0:
                storage.write(storage.join(folder, f"rollouts/{number + 1}.jsonl"), "".join(lines).encode())
            return {f"{name}_seconds": round(one.result(), 4) for name, one in seconds.items()}

        return state, metrics, finish

    return step, programs

"""From a config to a GRPO run: rollouts, rewards, updates, and the files written for each step."""

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

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
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.sampling.captioner import banned_ids
from avocado_jax.train.grpo import Experience, GrpoProgram, grpo_program
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
from avocado_jax.train.rewards import Rewards, caption_text, open_rewards
from avocado_jax.train.rollout import cut, fitting, warn_of_gap, widths
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
from avocado_jax.typing import Array


def grpo(config: GrpoConfig, folder: str) -> int:
    """Start, resume or finish the run in `folder` (local or gs://). Returns its exit status.

    Raises:
        InputError: the config is inconsistent, or the folder holds a run of another config.
    """
    setup = ready(config, folder, lambda: set_up(config, config.split, folder))
    mesh, model = setup.mesh, setup.model
    stops = stop_ids(setup.checkpoint.side_files, setup.words, model.text.vocab)
    with jax.set_mesh(mesh), open_rewards(config, setup, stops) as rewards:
        program = grpo_program(config, model, mesh, setup.steps, stops)
        open_folder(config, model, folder, setup.recipe.reading)
        checkpoints = Checkpoints(folder, config.keep)
        state = restored(config, setup, folder, checkpoints, program.state, program.begin)
        # The reference policy is the checkpoint `init`: every start reads it again, and it is never saved.
        reference = load_sharded(setup.checkpoint, program.reference, whole=False) if config.objective.beta else {}
        banned = jnp.asarray(banned_ids(model, setup.words, stops))
        updates = config.passes * config.minibatches

        def flops(batch: Batch, metrics: dict[str, float]) -> float:
            shape, length, beta = batch.bucket.shape, metrics["length"], config.objective.beta > 0
            row = sum(grpo_flops(model, shape, config.group, length, config.train, updates, beta))
            return config.batch * row * (1 - batch.padded)

        step, step_programs = _step(config, setup, program, rewards, reference, banned, stops, folder)
        evaluator = _evaluator(config, setup, program, rewards, banned, stops)

        def programs(buckets: list[Bucket]) -> list[Program]:
            found = agreement_programs(setup, buckets, rewards.references)
            for shapes in shapes_of(config, setup, program, buckets):
                found += sampling_programs(model, program, shapes).values()
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
            batches=lambda first: stream(setup, config, first, rewards.references),
            step=step,
            flops=flops,
        )


def shapes_of(config: GrpoConfig, setup: Setup, program: GrpoProgram, buckets: Iterable[Bucket]) -> list[StepShapes]:
    """The shapes of a step on each bucket."""
    return [step_shapes(config, setup.model, program, bucket, setup.mesh) for bucket in buckets]


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
    selects the width at which captions are scored and learned from.
    """
    phases, replicated, by_row = Phases(), NamedSharding(setup.mesh, PartitionSpec()), rows_sharding(setup.mesh)

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
        return [
            scoring,
            Program("advantages", group_advantages, (terms, weight)),
            Program("the longest caption", longest, (rollout.lengths,)),
            Program("the rollout's lines", gather, (written, with_sharding(reward, replicated))),
            *(Program("the cut", narrow, (rollout, width)) for width in widths(config.sampling.tokens)),
        ]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array], Callable[[], dict[str, Any]]]:
        phases.begin()
        clip = batch.clip
        encoded = program.encode and program.encode(state.params, clip)
        rollout = program.roll_out(program.view(state.params), clip, encoded, state.step, banned)
        phases.end("rollout", rollout.lengths)
        cropped = narrow(rollout, fitting(int(longest(rollout.lengths)), config.sampling.tokens))
        answers = rewards.judge(rollout, batch)
        scored = program.score(state.params, reference, clip, encoded, cropped.captions)
        phases.end("score", scored)
        judged = answers()  # the devices score while the host waits for a remote judge
        with jax.debug_nans(False):  # a term without a reference is NaN
            terms = rewards.terms(rollout, batch.references, judged)
            reward, advantage, reward_metrics = group_advantages(terms, batch.weight)
        phases.end("reward", advantage)
        experience = Experience(clip, encoded, cropped, scored, advantage, batch.weight)
        state, metrics = program.update(state, experience)
        phases.end("update", metrics)
        with jax.debug_nans(False):
            written = gather((rollout.captions.targets, rollout.lengths, terms, advantage), reward)
        seconds = phases.step()
        rewards.check(judged)  # after the update is dispatched, so that the devices need not wait for the host

        def finish() -> dict[str, Any]:
            warn_of_gap(batch.step + 1, metrics["sampler_gap"].item())
            lines = _lines(setup, stops, batch.step, *jax.device_get(written))
            if jax.process_index() == 0:
                storage.write(storage.join(folder, f"rollouts/{batch.step + 1}.jsonl"), "".join(lines).encode())
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
    evaluated = heldout(config, setup)
    greedy = replace(config, group=config.split, sampling=replace(config.sampling, temperature=0.0))
    greedy_program = grpo_program(greedy, setup.model, setup.mesh, setup.steps, stops)
    sums = jax.jit(partial(heldout_sums, rewards))

    def evaluate(state: State, step: int) -> dict[str, Any]:
        view = program.view(state.params)

        def measure(batch: Batch) -> Measured:
            encoded = program.encode and program.encode(state.params, batch.clip)
            rollout = greedy_program.roll_out(view, batch.clip, encoded, state.step, banned)
            judged = rewards.judge(rollout, batch)()
            with jax.debug_nans(False):  # a term without a reference is NaN
                terms = rewards.terms(rollout, batch.references, judged)
            part = sums(terms, rollout.lengths, batch.weight)
            rewards.check(judged)
            return part

        return heldout_means(config, evaluated, measure, rewards.references)

    buckets = evaluated.plan.buckets
    found = agreement_programs(evaluated, buckets, rewards.references)
    for shapes in shapes_of(greedy, evaluated, greedy_program, buckets):
        sampling = greedy_program._replace(encode=program.encode, view=program.view)
        found += sampling_programs(setup.model, sampling, shapes).values()
    scoring, lengths = rewards.program(shapes.rollout), shapes.rollout.lengths
    terms = by_rows(jax.eval_shape(scoring.run, *scoring.args), setup.mesh)
    found += [scoring, Program("held-out sums", sums, (terms, lengths, shapes.batch[2]))]
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

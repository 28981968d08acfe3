"""From a config to a run of GRPO: rollouts, their rewards, updates, and what is written of each."""

import json
from collections.abc import Callable, Iterator
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
from avocado_jax.parallel.batches import prefetch_to_mesh, rows_sharding
from avocado_jax.sampling.captioner import banned_ids
from avocado_jax.train.compiled import Program
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
from avocado_jax.train.rollout import Rollout, cut, fitting, widths
from avocado_jax.train.run import Setup, heldout, open_folder, restored, run, set_up, stream
from avocado_jax.train.startup import ready
from avocado_jax.train.state import State
from avocado_jax.typing import Array


def grpo(config: GrpoConfig, folder: str) -> int:
    """Start, resume or finish the run in `folder` (local or gs://). Returns its exit status.

    Raises:
        InputError: the config does not hold together, or the folder holds a run of another one.
    """
    setup = ready(config, folder, lambda: set_up(config, config.split))
    mesh, model = setup.mesh, setup.model
    stops = stop_ids(setup.checkpoint.side_files, setup.words, model.text.vocab)
    with jax.set_mesh(mesh), open_rewards(config, setup, stops) as rewards:
        program = grpo_program(config, model, mesh, setup.steps, stops)
        open_folder(config, model, folder, setup.recipe.reading)
        checkpoints = Checkpoints(folder, config.keep)
        state = restored(config, setup, folder, checkpoints, program.state, program.begin)
        # The reference is what `init` holds: it is read again at every start and never saved.
        reference = load_sharded(setup.checkpoint, program.reference, whole=False) if config.objective.beta else {}
        banned = jnp.asarray(banned_ids(model, setup.words, stops))
        updates = config.passes * config.minibatches

        def flops(batch: Batch, told: dict[str, float]) -> float:
            shape, length, beta = batch.bucket.shape, told["length"], config.objective.beta > 0
            row = sum(grpo_flops(model, shape, config.group, length, config.train, updates, beta))
            return config.batch * row * (1 - batch.padded)

        step, step_programs = _step(config, setup, program, rewards, reference, banned, stops, folder)
        evaluate, evaluation_programs = _heldout(config, setup, program, rewards, banned, stops)

        def programs(buckets: list[Bucket]) -> list[Program]:
            found = []
            for shapes in shapes_of(config, setup, program, buckets):
                found += sampling_programs(model, program, shapes).values()
                for width in widths(config.sampling.tokens):
                    found += learning_programs(config, program, shapes, mesh, width).values()
            return found + step_programs(shapes) + evaluation_programs

        return run(
            config,
            setup,
            folder,
            checkpoints,
            state,
            programs,
            batches=lambda first: _with_references(stream(setup, config, first), rewards),
            step=step,
            evaluate=evaluate,
            flops=flops,
            rank=lambda more: -more["heldout_reward"] if "heldout_reward" in more else None,
        )


def shapes_of(config: GrpoConfig, setup: Setup, program: GrpoProgram, buckets: list[Bucket]) -> list[StepShapes]:
    """The shapes of a step, once for all buckets that differ only in reference captions, which no program reads."""
    different = dict.fromkeys(bucket._replace(caption=1) for bucket in buckets)
    return [step_shapes(config, setup.model, program, bucket, setup.mesh) for bucket in different]


def _with_references(batches: Iterator[Batch], rewards: Rewards) -> Iterator[Batch]:
    """Batches with what rewards compare with: made where the input is, while the step before runs."""
    try:
        for batch in batches:
            yield batch._replace(references=rewards.references(batch.records))
    finally:
        batches.close()


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
    """One step as the loop takes it, and those of its programs that every bucket shares.

    Phases are dispatched and not waited for, the rollout apart: how long its captions are decides the width at which
    they are scored and learned from.
    """
    phases, whole, rows = Phases(), NamedSharding(setup.mesh, PartitionSpec()), rows_sharding(setup.mesh)

    def whole_groups(tree: Any) -> Any:
        return jax.tree.map(lambda leaf: leaf.reshape(config.batch, config.group, *leaf.shape[2:]), tree)

    @partial(jax.jit, out_shardings=(whole, rows, whole))
    def judged(terms: dict[str, Array], weight: Array) -> tuple[Array, Array, dict[str, Array]]:
        """Rewards [clips, group], advantages by row, and metrics."""
        weight = weight[:: config.split]
        reward, told = rewards.combine(whole_groups(terms), weight)
        clips = jnp.maximum(jnp.sum(weight), 1)
        metrics = {
            "reward": jnp.sum(jnp.mean(reward, axis=1) * weight) / clips,
            "reward_std": jnp.sum(jnp.std(reward, axis=1) * weight) / clips,
            "zero_variance": jnp.sum(zero_variance(reward) * weight) / clips,
        }
        advantage = advantages(reward, config.objective).reshape(-1, config.group // config.split)
        return reward, advantage, metrics | {f"reward_{name}": value for name, value in told.items()}

    everywhere = jax.jit(lambda rows, reward: (*whole_groups(rows), reward), out_shardings=whole)
    longest = jax.jit(jnp.max, out_shardings=whole)
    narrowed = jax.jit(cut, static_argnums=1, out_shardings=rows)

    def programs(shapes: StepShapes) -> list[Program]:
        rollout, weight = shapes.rollout, shapes.batch[2]
        scoring = rewards.program(rollout)
        terms = by_rows(jax.eval_shape(scoring.run, *scoring.args), setup.mesh)
        reward, advantage, _ = jax.eval_shape(judged, terms, weight)
        shown = rollout.captions.targets, rollout.lengths, terms, with_sharding(advantage, rows)
        return [
            scoring,
            Program("advantages", judged, (terms, weight)),
            Program("the longest caption", longest, (rollout.lengths,)),
            Program("the rollout's lines", everywhere, (shown, with_sharding(reward, whole))),
            *(Program("the cut", narrowed, (rollout, width)) for width in widths(config.sampling.tokens)),
        ]

    def step(state: State, batch: Batch) -> tuple[State, dict[str, Array], Callable[[], dict[str, Any]]]:
        phases.begin()
        clip = batch.clip
        encoded = program.encode and program.encode(state.params, clip)
        rollout = program.roll_out(program.view(state.params), clip, encoded, state.step, banned)
        phases.end("rollout", rollout.lengths)
        narrow = narrowed(rollout, fitting(int(longest(rollout.lengths)), config.sampling.tokens))
        asked = rewards.ask(rollout, batch.records)
        scored = program.score(state.params, reference, clip, encoded, narrow.captions)
        phases.end("score", scored)
        terms = rewards.terms(rollout, batch.references, asked)  # the device scores while a remote judge is waited for
        reward, advantage, told = judged(terms, batch.weight)
        phases.end("reward", advantage)
        experience = Experience(clip, encoded, narrow, scored, advantage, batch.weight)
        state, metrics = program.update(state, experience)
        phases.end("update", metrics)
        shown = everywhere((rollout.captions.targets, rollout.lengths, terms, advantage), reward)
        ended = phases.step()

        def tell() -> dict[str, Any]:
            lines = _lines(setup, stops, batch.step, *jax.device_get(shown))
            if jax.process_index() == 0:
                storage.write(storage.join(folder, f"rollouts/{batch.step + 1}.jsonl"), "".join(lines).encode())
            return {f"{name}_seconds": round(seconds.result(), 4) for name, seconds in ended.items()}

        return state, metrics | told, tell

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
    """A line of JSON for each caption of a step, in order."""
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
    """JSON has no NaN, which a term without a reference is: null stands for it."""
    return float(value) if np.isfinite(value) else None


def _heldout(
    config: GrpoConfig, setup: Setup, program: GrpoProgram, rewards: Rewards, banned: Array, stops: tuple[int, ...]
) -> tuple[Callable[[State, int], dict[str, Any]], list[Program]]:
    """The evaluation and its programs: rewards of the likeliest captions of the first `eval_rows` held-out clips."""
    if not config.data.heldout:
        return lambda state, step: {}, []
    kept = heldout(config, setup)
    greedy = replace(config, group=config.split, sampling=replace(config.sampling, temperature=0.0))
    likeliest = grpo_program(greedy, setup.model, setup.mesh, setup.steps, stops)

    @jax.jit
    def sums(terms: dict[str, Array], rollout: Rollout, weight: Array) -> dict[str, tuple[Array, Array]]:
        reward, _ = rewards.combine(terms, weight)
        measured = {f"reward_{name}": value for name, value in terms.items()}
        measured |= {"reward": reward, "length": rollout.lengths.astype(jnp.float32)}
        known = {name: jnp.isfinite(value) & (weight > 0)[:, None] for name, value in measured.items()}
        return {name: (jnp.sum(value, where=known[name]), jnp.sum(known[name])) for name, value in measured.items()}

    def evaluate(state: State, step: int) -> dict[str, Any]:
        view, total = program.view(state.params), {}
        for batch in prefetch_to_mesh(_with_references(stream(kept, config, 0), rewards), setup.mesh):
            encoded = program.encode and program.encode(state.params, batch.clip)
            rollout = likeliest.roll_out(view, batch.clip, encoded, state.step, banned)
            asked = rewards.ask(rollout, batch.records)
            part = sums(rewards.terms(rollout, batch.references, asked), rollout, batch.weight)
            for name, (value, count) in jax.device_get(part).items():
                before = total.get(name, (0.0, 0))
                total[name] = before[0] + float(value), before[1] + int(count)
        return {f"heldout_{name}": value / max(count, 1) for name, (value, count) in total.items()}

    found = []
    for shapes in shapes_of(greedy, kept, likeliest, list(kept.plan.buckets)):
        sampling = likeliest._replace(encode=program.encode, view=program.view)
        found += sampling_programs(setup.model, sampling, shapes).values()
    scoring = rewards.program(shapes.rollout)
    terms = by_rows(jax.eval_shape(scoring.run, *scoring.args), setup.mesh)
    return evaluate, [*found, scoring, Program("held-out sums", sums, (terms, shapes.rollout, shapes.batch[2]))]

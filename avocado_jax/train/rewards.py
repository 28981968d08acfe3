"""The rewards of a run: references as arrays, terms computed beside the model, one judge answer for all processes."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig, RewardConfig
from avocado_jax.data.pipeline import Batch, Source
from avocado_jax.data.storage import StorageError
from avocado_jax.errors import InputError
from avocado_jax.parallel.backend import on_cpu
from avocado_jax.parallel.batches import process_rows, rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.parallel.replicas import observe, row_owners
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.combine import (
    JUDGES,
    TERMS,
    References,
    Thresholds,
    combine,
    make_references,
    missing,
    score_captions,
)
from avocado_jax.rewards.text import limits_for
from avocado_jax.rewards.vocabulary import make_table
from avocado_jax.train.judges import Judge, open_judge
from avocado_jax.train.programs import by_rows
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run import Setup
from avocado_jax.typing import Array, Float, Int

MAX_CHARACTERS, MAX_FEATURES = 512, 1024  # distinct characters of a clip's dialogue, distinct features of its keypoints
SAMPLE_RECORDS = 4  # records that are checked for missing references at start-up
NOT_ASKED, UNANSWERED = -2.0, -1.0  # in place of a score, while the processes share what they know


class Judged(NamedTuple):
    """The answers of a judge to a batch, the same on all processes."""

    answers: Float[Array, "B G K"]  # NaN without a keypoint, or without an answer
    asked: Int[Array, ""]  # keypoints
    missing: Int[Array, ""]  # keypoints without an answer


class Rewards(NamedTuple):
    """The reward functions of a run.

    Attributes:
        references: fields of records -> what captions are compared with, numpy [B, ...], of one shape for all records.
        judge: (rollout, batch) -> a function that waits for the answers. It starts the judge, and returns before the
            answers are there. None if captions are judged by their words.
        terms: (rollout, references, judged) -> each term, [B G]; NaN if a clip has no reference for it.
        combine: (terms of complete groups, weight [B], normalize=`rewards.normalize`) -> (reward [B G], metrics of the
            rows that count).
        program: shapes of a rollout -> the program that `terms` runs.
        check: raises `Unjudged` if too many answers are missing. It waits for the devices; all processes agree.
    """

    references: Callable[[Sequence[Mapping[str, Any]]], References]
    judge: Callable[[Rollout, Batch], Callable[[], Judged | None]]
    terms: Callable[[Rollout, References, Judged | None], dict[str, Array]]
    combine: Callable[..., tuple[Array, dict[str, Array]]]
    program: Callable[[Rollout], Program]
    check: Callable[[Judged | None], None]


class Unjudged(OSError):
    """A judge left more keypoints without an answer than the config allows."""


def caption_text(setup: Setup, stops: Sequence[int], ids: Sequence[int]) -> str:
    """The text of a sampled caption, without its stop."""
    return setup.words.decode([token for token in ids if token not in stops]).strip()


@contextmanager
def open_rewards(config: GrpoConfig, setup: Setup, stops: Sequence[int]) -> Iterator[Rewards]:
    """The rewards of `config`. Prints which terms have no reference in the first records.

    Raises:
        InputError: the judge cannot be opened.
    """
    rewards = config.rewards
    if rewards.judge not in JUDGES:
        raise InputError(f"rewards.judge: {rewards.judge!r} is none of {', '.join(JUDGES)}")
    if rewards.judge == "lexical" or not rewards.checklist:
        yield make_rewards(config, setup, stops, None)
        return
    if not rewards.judge_model:
        raise InputError(
            f"rewards.judge is {rewards.judge}: rewards.judge_model names its folder, or the model at the endpoint"
        )
    with open_judge(rewards.judge, rewards.judge_model, config.dtype, _endpoint(rewards)) as judge:
        yield make_rewards(config, setup, stops, judge)


def _endpoint(rewards: RewardConfig) -> Endpoint | None:
    if rewards.judge != "remote":
        return None
    cache = Path(rewards.judge_cache) if rewards.judge_cache else None
    return Endpoint(rewards.judge_url, rewards.judge_model, cache=cache, patience=rewards.judge_patience)


def make_rewards(config: GrpoConfig, setup: Setup, stops: Sequence[int], judge: Judge | None) -> Rewards:
    """The rewards of `config` with an open judge; None judges captions by their words."""
    settings, table = config.rewards, make_table(setup.words.json)
    limits = limits_for(config.sampling.tokens)._replace(quotes=settings.lines)
    thresholds = Thresholds(
        low=settings.covered_low, high=settings.covered_high, length_low=settings.low, length_high=settings.high
    )
    weights = {name: getattr(settings, name) for name in TERMS}

    @partial(jax.jit, out_shardings=rows_sharding(setup.mesh))
    def score_terms(
        table: Any, tokens: Array, lengths: Array, references: References, answers: Any
    ) -> dict[str, Array]:
        return score_captions(table, tokens, lengths, references, thresholds, answers, limits)

    def references(records: Sequence[Mapping[str, Any]]) -> References:
        with on_cpu():  # this runs in the input thread while the accelerators compute a step
            return make_references(table, records, limits, settings.keypoints, MAX_FEATURES, MAX_CHARACTERS)[0]

    def no_judge(rollout: Rollout, batch: Batch) -> Callable[[], None]:
        return lambda: None

    def terms(rollout: Rollout, references: References, judged: Judged | None) -> dict[str, Array]:
        answers = judged.answers if judged else None
        return score_terms(table, rollout.captions.targets, rollout.lengths, references, answers)

    def program(rollout: Rollout) -> Program:
        rows, group, _ = rollout.captions.targets.shape
        one = references([{}])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), one)
        answers = jax.ShapeDtypeStruct((rows, group, settings.keypoints), jnp.float32) if judge else None
        inputs = by_rows((shapes, answers), setup.mesh)
        return Program("rewards", score_terms, (table, rollout.captions.targets, rollout.lengths, *inputs))

    def reward(
        terms: dict[str, Array], weight: Array, normalize: bool = settings.normalize
    ) -> tuple[Array, dict[str, Array]]:
        counted = {name: jnp.where((weight > 0)[:, None], value, jnp.nan) for name, value in terms.items()}
        return combine(counted, weights, normalize, settings.gate)

    def check(judged: Judged | None) -> None:
        asked, missing = jax.device_get((judged.asked, judged.missing)) if judged else (0, 0)
        if missing > settings.max_unjudged * asked:
            raise Unjudged(
                f"the judge left {missing} of {asked} keypoints of a step without an answer; nothing is lost"
            )

    if jax.process_index() == 0:
        _warn_of_missing(setup.source, references, [name for name in TERMS if weights[name]])
    judged = _shared(judge, setup.mesh, settings.keypoints, partial(caption_text, setup, stops)) if judge else no_judge
    return Rewards(references, judged, terms, reward, program, check)


def _warn_of_missing(source: Source, references: Callable, terms: Sequence[str]) -> None:
    """Print which terms have no reference in the first records that can be read."""
    fields = []
    for number in range(min(SAMPLE_RECORDS, len(source.index.ids))):
        with suppress(InputError, StorageError, TimeoutError):  # the run counts and lists records that are lost
            fields.append(source[number].fields)
    for name, without in missing(references(fields)).items() if fields else ():
        if name in terms and without.any():
            count = f"{without.sum()} of the first {len(fields)} clips"
            print(f"rewards.{name}: {count} have no reference for it and get nothing of it", file=sys.stderr)


def _shared(
    judge: Judge, mesh: Mesh, limit: int, text: Callable[[Sequence[int]], str]
) -> Callable[[Rollout, Batch], Callable[[], Judged]]:
    """`Rewards.judge`: one process judges each caption, all processes receive the answers.

    Args:
        limit: keypoints of a clip that are judged, K.
        text: token ids of a caption to its text.
    """
    rows, replicated = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
    gather = jax.jit(lambda tree: tree, out_shardings=replicated)

    @partial(jax.jit, out_shardings=Judged(rows, replicated, replicated))
    def share(observed: Float[Array, "R B G K"]) -> Judged:
        scores = jnp.max(observed, axis=0)  # of the owner: all others have NOT_ASKED
        answers = jnp.where(scores >= 0, scores, jnp.nan)
        return Judged(answers, jnp.sum(scores > NOT_ASKED), jnp.sum(scores == UNANSWERED))

    def start(rollout: Rollout, batch: Batch) -> Callable[[], Judged]:
        tokens, lengths, weight = jax.device_get(gather((rollout.captions.targets, rollout.lengths, batch.weight)))
        size, group = lengths.shape
        local, owners = process_rows(mesh, size, jax.process_index()), row_owners(mesh, size)
        places, captions, keypoints = [], [], []
        for place, (row, record) in enumerate(zip(local, batch.records, strict=True)):
            points = [point["text"] for point in (record.get("keypoints") or ())[:limit]]
            if points and weight[row] and owners[row] == jax.process_index():
                places += [(place, caption) for caption in range(group)]
                captions += [text(ids[:length].tolist()) for ids, length in zip(tokens[row], lengths[row])]
                keypoints += [points] * group
        wait = judge(captions, keypoints)

        def collect() -> Judged:
            observed = np.full((len(local), group, limit), NOT_ASKED, np.float32)
            for place, points, scores in zip(places, keypoints, wait(), strict=True):
                known = scores[: len(points)]
                observed[place][: len(points)] = np.where(np.isfinite(known), known, UNANSWERED)
            with jax.debug_nans(False):  # a keypoint without an answer is NaN
                return share(observe(mesh, local, size, observed))

        return collect

    return start

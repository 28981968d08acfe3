"""The rewards of a run: its references as arrays, its terms beside the model, their sum."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig, RewardConfig
from avocado_jax.errors import InputError
from avocado_jax.parallel.batches import process_rows, rows_sharding
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
from avocado_jax.train.compiled import Program
from avocado_jax.train.judges import Judge, open_judge
from avocado_jax.train.programs import by_rows
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run import Setup
from avocado_jax.typing import Array, Float

LETTERS, FEATURES = 512, 1024  # room for the distinct letters of a clip's lines, and features of its keypoints
LOOKED_AT = 4  # records of which missing references are told at start-up


class Rewards(NamedTuple):
    """What a run asks of its rewards.

    Attributes:
        references: fields of records -> what they are compared with, numpy [B, ...] of one shape whatever they hold.
        ask: (rollout, this process's records) -> the answers of a judge that has its own model, begun; to be given to
            `terms`, which waits for them. None where captions are judged by their words.
        terms: (rollout, references, what `ask` gave) -> each term, [B G]; NaN where a clip has no reference for it.
        combine: (terms of whole groups, weight [B]) -> (reward [B G], metrics of the rows that count).
        program: shapes of a rollout -> the program that `terms` runs.
    """

    references: Callable[[Sequence[Mapping[str, Any]]], References]
    ask: Callable[[Rollout, Sequence[Mapping[str, Any]]], Callable[[], Array] | None]
    terms: Callable[[Rollout, References, Callable[[], Array] | None], dict[str, Array]]
    combine: Callable[[dict[str, Array], Array], tuple[Array, dict[str, Array]]]
    program: Callable[[Rollout], Program]


class Unjudged(OSError):
    """A judge left more keypoints without an answer than a run allows."""


def caption_text(setup: Setup, stops: Sequence[int], ids: Sequence[int]) -> str:
    """The words of a sampled caption, without its stop."""
    return setup.words.decode([one for one in ids if one not in stops]).strip()


@contextmanager
def open_rewards(config: GrpoConfig, setup: Setup, stops: Sequence[int]) -> Iterator[Rewards]:
    """The rewards that `config` names, while the block runs. Says which terms have no reference in the first records.

    Raises:
        InputError: the judge that it names cannot be had.
    """
    asked = config.rewards
    if asked.judge not in JUDGES:
        raise InputError(f"rewards.judge: {asked.judge!r} is none of {', '.join(JUDGES)}")
    if asked.judge == "lexical" or not asked.checklist:
        yield _rewards(config, setup, stops, None)
        return
    if not asked.judge_model:
        raise InputError(f"rewards.judge is {asked.judge}: rewards.judge_model names its folder, or it at the endpoint")
    with open_judge(asked.judge, asked.judge_model, config.dtype, _endpoint(asked)) as judge:
        yield _rewards(config, setup, stops, judge)


def _endpoint(asked: RewardConfig) -> Endpoint | None:
    if asked.judge != "remote":
        return None
    cache = Path(asked.judge_cache) if asked.judge_cache else None
    return Endpoint(asked.judge_url, asked.judge_model, cache=cache, patience=asked.judge_patience)


def _rewards(config: GrpoConfig, setup: Setup, stops: Sequence[int], judge: Judge | None) -> Rewards:
    asked, table = config.rewards, make_table(setup.words.json)
    limits = limits_for(config.sampling.tokens)._replace(quotes=asked.lines)
    thresholds = Thresholds(
        low=asked.covered_low, high=asked.covered_high, length_low=asked.low, length_high=asked.high
    )
    weights = {name: getattr(asked, name) for name in TERMS}

    @partial(jax.jit, out_shardings=rows_sharding(setup.mesh))
    def scored(table: Any, tokens: Array, lengths: Array, references: References, answers: Any) -> dict[str, Array]:
        return score_captions(table, tokens, lengths, references, thresholds, answers, limits)

    def references(records: Sequence[Mapping[str, Any]]) -> References:
        return make_references(table, records, limits, asked.keypoints, FEATURES, LETTERS)[0]

    whole = jax.jit(lambda rows: rows, out_shardings=NamedSharding(setup.mesh, PartitionSpec()))

    def ask(rollout: Rollout, records: Sequence[Mapping[str, Any]]) -> Callable[[], Array] | None:
        if judge is None:
            return None
        tokens, lengths = jax.device_get(whole((rollout.captions.targets, rollout.lengths)))
        mine = process_rows(setup.mesh, len(tokens), jax.process_index())
        points = [[one["text"] for one in (record.get("keypoints") or ())[: asked.keypoints]] for record in records]
        texts = [
            [caption_text(setup, stops, ids[:length]) for ids, length in zip(tokens[row].tolist(), lengths[row])]
            for row in mine
        ]
        group = tokens.shape[1]
        wait = judge([text for row in texts for text in row], [own for own in points for _ in range(group)])
        return partial(answers, wait, (len(mine), group), group * sum(map(len, points)))

    def answers(wait: Callable[[], np.ndarray], shape: tuple[int, int], total: int) -> Float[Array, "B G K"]:
        scores = wait()
        missing = total - int(np.isfinite(scores).sum())
        if missing > asked.max_unjudged * total:
            raise Unjudged(
                f"the judge left {missing} of {total} keypoints of a step without an answer; nothing is lost"
            )
        held = np.full((shape[0] * shape[1], asked.keypoints), np.nan, np.float32)
        held[:, : scores.shape[1]] = scores
        return jax.make_array_from_process_local_data(rows_sharding(setup.mesh), held.reshape(*shape, -1))

    def terms(rollout: Rollout, references: References, asked: Callable[[], Array] | None) -> dict[str, Array]:
        judged = asked() if asked else None
        return scored(table, rollout.captions.targets, rollout.lengths, references, judged)

    def program(rollout: Rollout) -> Program:
        count, group, _ = rollout.captions.targets.shape
        one = references([{}])
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((count, *leaf.shape[1:]), leaf.dtype), one)
        answers = jax.ShapeDtypeStruct((count, group, asked.keypoints), jnp.float32) if judge else None
        known = by_rows((shapes, answers), setup.mesh)
        return Program("rewards", scored, (table, rollout.captions.targets, rollout.lengths, *known))

    def summed(terms: dict[str, Array], weight: Array) -> tuple[Array, dict[str, Array]]:
        counted = {name: jnp.where((weight > 0)[:, None], value, jnp.nan) for name, value in terms.items()}
        return combine(counted, weights, asked.normalize, asked.gate)

    first = [setup.source[number].fields for number in range(min(LOOKED_AT, len(setup.source.index.ids)))]
    for name, lacking in missing(references(first)).items():
        if weights[name] and lacking.any() and jax.process_index() == 0:
            count = f"{lacking.sum()} of the first {len(first)} clips"
            print(f"rewards.{name}: {count} have no reference for it and get nothing of it", file=sys.stderr)
    return Rewards(references, ask, terms, summed, program)

"""The rewards of a run: its references as arrays, its terms beside the model, their sum."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.config import GrpoConfig
from avocado_jax.rewards.combine import TERMS, References, Thresholds, combine, make_references, missing, score_captions
from avocado_jax.rewards.text import limits_for
from avocado_jax.rewards.vocabulary import make_table
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run import Setup
from avocado_jax.typing import Array

LETTERS, FEATURES = 512, 1024  # room for the distinct letters of a clip's lines, and features of its keypoints
LOOKED_AT = 4  # records of which missing references are told at start-up


class Rewards(NamedTuple):
    """What a run asks of its rewards.

    Attributes:
        references: fields of records -> what they are compared with, numpy [B, ...] of one shape whatever they hold.
        terms: (rollout, references) -> each term, [B G]; NaN where a clip has no reference for it.
        combine: (terms of whole groups, weight [B]) -> (reward [B G], metrics of the rows that count).
    """

    references: Callable[[Sequence[Mapping[str, Any]]], References]
    terms: Callable[[Rollout, References], dict[str, Array]]
    combine: Callable[[dict[str, Array], Array], tuple[Array, dict[str, Array]]]


def open_rewards(config: GrpoConfig, setup: Setup) -> Rewards:
    """The rewards that `config` names. Says which terms have no reference in the first records."""
    asked, table = config.rewards, make_table(setup.words.json)
    limits = limits_for(config.sampling.tokens)._replace(quotes=asked.lines)
    thresholds = Thresholds(
        low=asked.covered_low, high=asked.covered_high, length_low=asked.low, length_high=asked.high
    )
    weights = {name: getattr(asked, name) for name in TERMS}
    scored = jax.jit(partial(score_captions, thresholds=thresholds, limits=limits))

    def references(records: Sequence[Mapping[str, Any]]) -> References:
        return make_references(table, records, limits, asked.keypoints, FEATURES, LETTERS)[0]

    def summed(terms: dict[str, Array], weight: Array) -> tuple[Array, dict[str, Array]]:
        counted = {name: jnp.where((weight > 0)[:, None], value, jnp.nan) for name, value in terms.items()}
        return combine(counted, weights, asked.normalize, asked.gate)

    first = [setup.source[number].fields for number in range(min(LOOKED_AT, len(setup.source.index.ids)))]
    for name, lacking in missing(references(first)).items():
        if weights[name] and lacking.any() and jax.process_index() == 0:
            count = f"{lacking.sum()} of the first {len(first)} clips"
            print(f"rewards.{name}: {count} have no reference for it and get nothing of it", file=sys.stderr)
    return Rewards(
        references=references,
        terms=lambda rollout, references: scored(table, rollout.captions.targets, rollout.lengths, references),
        combine=summed,
    )

"""The rewards of a run: its references as arrays, its terms beside the model, their sum."""

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.config import GrpoConfig, RewardConfig
from avocado_jax.rewards.checklist import checklist_reward, keypoint_references
from avocado_jax.rewards.dialogue import dialogue_references, dialogue_reward
from avocado_jax.rewards.length import length_reward
from avocado_jax.rewards.repetition import collapses
from avocado_jax.rewards.text import Limits, Table, decode, limits_for, make_table, parse
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run import Setup
from avocado_jax.typing import Array, Float

LETTERS, FEATURES, DISTINCT = 512, 64, 1024  # room for a reference's letters; features of a keypoint, and of all


class Rewards(NamedTuple):
    """What a run asks of its rewards.

    Attributes:
        references: fields of records -> what they are compared with, numpy [B, ...] of one shape whatever they hold.
        terms: (rollout, references) -> each term, [B G]; NaN where a clip has no reference for it.
        combine: (terms, weight [B]) -> (reward [B G], metrics).
    """

    references: Callable[[Sequence[Mapping[str, Any]]], Any]
    terms: Callable[[Rollout, Any], dict[str, Array]]
    combine: Callable[[dict[str, Array], Array], tuple[Array, dict[str, Array]]]


def open_rewards(config: GrpoConfig, setup: Setup) -> Rewards:
    """The rewards that `config` names. Says which terms have no reference in the first records."""
    rewards, limits = config.rewards, limits_for(config.sampling.tokens)._replace(quotes=config.rewards.lines)
    table = make_table(setup.words.json)
    source = setup.source
    first = [source[number].fields for number in range(min(4, len(source.index.ids)))]
    for term, field in (("checklist", "keypoints"), ("dialogue", "dialogues")):
        lacking = sum(field not in one for one in first)
        if getattr(rewards, term) and lacking and jax.process_index() == 0:
            instead = "they are read from its caption" if term == "dialogue" else "they get no reward for it"
            print(
                f"rewards.{term}: {lacking} of the first {len(first)} clips have no {field}; {instead}", file=sys.stderr
            )
    scored = jax.jit(partial(_terms, config=rewards, limits=limits))
    return Rewards(
        references=partial(_references, table, rewards, limits),
        terms=lambda rollout, references: scored(table, rollout.captions.targets, rollout.lengths, references),
        combine=partial(combine, config=rewards),
    )


def _references(table: Table, config: RewardConfig, limits: Limits, records: Sequence[Mapping[str, Any]]) -> Any:
    """Keypoints and dialogues of clips. What does not fit is cut, the same on every host."""
    captions = [record.get("caption") for record in records]
    points = [record.get("keypoints") for record in records]
    said = [record.get("dialogues") for record in records]
    keypoints, _ = keypoint_references(table, points, captions, limits, config.keypoints, FEATURES, DISTINCT)
    return keypoints, dialogue_references(table, said, captions, limits, LETTERS)[0]


def _terms(
    table: Table, tokens: Array, lengths: Array, references: Any, *, config: RewardConfig, limits: Limits
) -> dict[str, Float[Array, "B G"]]:
    def of_caption(tokens: Array, length: Array, references: Any) -> dict[str, Array]:
        points, count = decode(table, tokens, length, limits.characters)
        caption, (keypoints, dialogue) = parse(table, points, count, limits), references
        return {
            "R_C": checklist_reward(caption, keypoints),
            "R_D": dialogue_reward(caption, dialogue),
            "R_L": length_reward(length, config.low, config.high),
            "repcol": collapses(points, count).astype(jnp.float32),
        }

    return jax.vmap(jax.vmap(of_caption, (0, 0, None)))(tokens, lengths, references)


def combine(
    terms: dict[str, Float[Array, "B G"]], weight: Float[Array, "B"], config: RewardConfig
) -> tuple[Float[Array, "B G"], dict[str, Float[Array, ""]]]:
    """The weighted sum (paper: R_C + R_D + R_L), where a missing term adds nothing; and each term's mean and spread.

    `NAME` is the mean over captions of rows that count, `NAME_std` the mean of the std within groups.
    """
    weights = {"R_C": config.checklist, "R_D": config.dialogue, "R_L": config.length, "repcol": -config.repetition}
    total = sum(factor * jnp.nan_to_num(terms[name]) for name, factor in weights.items() if factor)
    told = {}
    for name, value in {**terms, "reward": total}.items():
        known = jnp.isfinite(value) & (weight > 0)[:, None]
        told[name] = jnp.sum(value, where=known) / jnp.maximum(jnp.sum(known), 1)
        rows = jnp.all(known, axis=1)
        told[f"{name}_std"] = jnp.sum(jnp.std(value, axis=1), where=rows) / jnp.maximum(jnp.sum(rows), 1)
    return total, told

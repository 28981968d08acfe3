"""Compute all reward terms of captions in one pure function, and their weighted sum.

B  clips      G  captions of a clip      C  tokens of a caption      K  keypoints
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.rewards.checklist import HIGH, LOW, ORDER, Keypoints, Verdict, keypoint_references, lexical, mean_score
from avocado_jax.rewards.dialogue import SIMILAR, SPEAKER, Dialogue, Pairs, compare, dialogue_references, f1
from avocado_jax.rewards.extra import Term
from avocado_jax.rewards.length import length_reward
from avocado_jax.rewards.repetition import MIN_SPAN, collapses
from avocado_jax.rewards.text import Caption, Limits, limits_for, read
from avocado_jax.rewards.timing import Events, event_references, find_scenes, timing_reward
from avocado_jax.rewards.vocabulary import Table
from avocado_jax.typing import Array, Float, Int

TERMS = ("checklist", "dialogue", "length", "repetition", "timing", "probes")
ALWAYS = TERMS[:4]  # computed and logged in every run; the others only if they have a weight
JUDGES = ("lexical", "embedding", "lm", "remote")  # judges of R_C; "lexical" needs no model
PROBE_JUDGES = ("lm", "remote")


class Thresholds(NamedTuple):
    """Free parameters of the reward terms. Static."""

    similar: float = SIMILAR  # R_D: minimum similarity of two lines that match
    speaker: float = SPEAKER  # R_D: minimum share of a speaker's description
    low: float = LOW  # R_C, lexical: covered share of a keypoint with score 0
    high: float = HIGH  # R_C, lexical: covered share with score 1
    order: float = ORDER  # R_C, lexical: penalty for keypoints in the wrong order
    length_low: int = 2048  # R_L: longest caption, in tokens, with R_L = 1
    length_high: int = 4096  # R_L: shortest caption, in tokens, with R_L = 0
    min_span: int = MIN_SPAN  # RepCol: minimum characters of a repeated stretch
    long_units: bool = False  # RepCol: also detect repeated sentences of 100 to 400 characters


DEFAULTS = Thresholds()


class References(NamedTuple):
    """References for captions of B clips. Leaves have a leading clip axis."""

    dialogue: Dialogue
    keypoints: Keypoints
    events: Events | None = None  # None: captions have no term `timing`


class Scored(NamedTuple):
    """The terms of one caption, with the intermediate results that explain them.

    Attributes:
        terms: raw values by name. R_C, R_D and R_L are in [0, 1], NaN without a reference. `repetition` is -1 for a
            caption that collapses, else 0. `truncated` is 1 if the caption exceeded the limits. `timing` (in [0, 1])
            exists if the references have event arrays, `probes` (in [0, 1]) if a judge scored probes. User terms
            follow.
        keypoints: the judge's scores.
        verdict, pairs: results of the lexical judge and line comparisons of R_D.
    """

    terms: dict[str, Float[Array, ""]]
    keypoints: Float[Array, "K"]
    verdict: Verdict
    pairs: Pairs


def make_references(
    table: Table,
    clips: Sequence[Mapping],
    limits: Limits,
    keypoints: int = 0,
    distinct: int = 0,
    alphabet: int = 0,
    events: int = 0,
) -> tuple[References, np.ndarray]:
    """Convert the references of clips to arrays.

    Args:
        clips: mappings with "caption", "dialogues", "keypoints" and "events"; each may be absent or None. Missing
            dialogues are parsed from the caption.
        limits: `quotes` and `line` also apply to dialogues.
        keypoints: maximum keypoints per clip. 0: the maximum of these clips.
        distinct: maximum distinct keypoint features per clip. 0: the maximum of these clips.
        alphabet: maximum distinct characters of a clip's lines. 0: the maximum of these clips.
        events: maximum events per clip. 0: no `timing` term.

    Returns:
        The references, and bool [B]: the clips whose reference was truncated.
    """
    captions = [clip.get("caption") for clip in clips]
    lists = [clip.get("keypoints") for clip in clips]
    size = keypoints or max(1, 1, *(len(points or ()) for points in lists))
    lines, truncated_lines = dialogue_references(
        table, [clip.get("dialogues") for clip in clips], captions, limits, alphabet
    )
    points, truncated_keypoints = keypoint_references(table, lists, captions, limits, size, distinct=distinct)
    if not events:
        return References(lines, points), truncated_lines | truncated_keypoints
    timed, truncated_events = event_references([clip.get("events") for clip in clips], events)
    return References(lines, points, timed), truncated_lines | truncated_keypoints | truncated_events


def missing(references: References) -> dict[str, np.ndarray]:
    """Map each term that needs a reference to bool [B]: the clips without one."""
    without = {
        "checklist": np.asarray(references.keypoints.count) <= 0,
        "dialogue": np.asarray(references.dialogue.count) < 0,
    }
    return without | ({} if references.events is None else {"timing": np.asarray(references.events.count) <= 0})


def score(
    caption: Caption,
    tokens: Int[Array, ""],
    reference: References,
    thresholds: Thresholds = DEFAULTS,
    answers: Float[Array, "K"] | None = None,
    probes: Float[Array, "P"] | None = None,
    extra: Sequence[Term] = (),
) -> Scored:
    """Score one caption against one reference.

    Args:
        tokens: number of tokens of the caption.
        answers: a judge's keypoint scores; NaN without an answer. None: use the lexical judge.
        probes: a judge's probe scores; NaN without an answer. None: no `probes` term.
        extra: user terms of kind "jax".
    """
    verdict = lexical(caption, reference.keypoints, thresholds.low, thresholds.high, thresholds.order)
    answers = verdict.score if answers is None else answers
    pairs = compare(caption, reference.dialogue, thresholds.similar, thresholds.speaker)
    looping = collapses(caption.points, caption.length, thresholds.min_span, thresholds.long_units)
    terms = {
        "checklist": mean_score(answers, reference.keypoints.count),
        "dialogue": f1(pairs, caption.quotes, reference.dialogue.count),
        "length": length_reward(tokens, thresholds.length_low, thresholds.length_high),
        "repetition": -looping.astype(jnp.float32),
        "truncated": caption.truncated.astype(jnp.float32),
    }
    if reference.events is not None:
        scenes = find_scenes(caption.points, caption.length, reference.events.start.shape[-1])
        terms["timing"] = timing_reward(scenes, reference.events)
        terms["truncated"] = (caption.truncated | scenes.truncated).astype(jnp.float32)
    if probes is not None:
        terms["probes"] = mean_score(probes, jnp.int32(len(probes)))
    terms |= {term.name: term.value(caption, reference) for term in extra}
    return Scored(terms, answers, verdict, pairs)


def score_captions(
    table: Table,
    tokens: Int[Array, "B G C"],
    lengths: Int[Array, "B G"],
    references: References,
    thresholds: Thresholds = DEFAULTS,
    answers: Float[Array, "B G K"] | None = None,
    limits: Limits | None = None,
    probes: Float[Array, "B G P"] | None = None,
    extra: Sequence[Term] = (),
) -> dict[str, Float[Array, "B G"]]:
    """Compute the raw value of every term for G captions of each of B clips.

    Args:
        tokens: token ids. Ids at or after `lengths` are ignored. A stop id before `lengths` counts as a token and has
            no text.
        answers: keypoint scores of a judge other than the lexical one.
        limits: maximum sizes of a parsed caption. Default: `limits_for(C)`.
        probes: scores of each clip's probes; NaN without an answer.
        extra: user terms of kind "jax".
    """
    limits = limits or limits_for(tokens.shape[-1])

    def score_one(ids: Array, length: Array, reference: References, *judged: Array | None) -> dict[str, Array]:
        return score(read(table, ids, length, limits), length, reference, thresholds, *judged, extra).terms

    judged_axes = [None if scores is None else 0 for scores in (answers, probes)]
    score_group = jax.vmap(score_one, in_axes=(0, 0, None, *judged_axes))
    return jax.vmap(score_group, in_axes=(0, 0, 0, *judged_axes))(tokens, lengths, references, answers, probes)


def combine(
    terms: Mapping[str, Float[Array, "B G"]],
    weights: Mapping[str, float],
    normalize: bool = False,
    gate: bool = False,
) -> tuple[Float[Array, "B G"], dict[str, Float[Array, ""]]]:
    """Combine the terms into the reward of each caption, and compute metrics of the terms.

    A missing value is replaced by the mean of its group, so that it does not change the advantage. A term that is
    missing in a whole group contributes 0.

    Args:
        terms: raw values; NaN if missing.
        weights: weights of the included terms. The paper's reward is the plain sum of checklist, dialogue and length.
        normalize: standardize each term within its group before weighting, so that terms of small variance keep their
            influence (GDPO). A constant term gives 0.
        gate: set the dialogue term of captions that collapse to 0.

    Returns:
        The rewards, and for each term the metrics `NAME` (mean of the values present), `NAME_std`, `NAME_flat` (share
        of the groups with a value in which all values are equal) and `NAME_missing` (share of missing values).
    """
    total = jnp.zeros(next(iter(terms.values())).shape, jnp.float32)
    metrics = {}
    for name, weight in weights.items():
        value = terms[name].astype(jnp.float32)
        known = ~jnp.isnan(value)
        if gate and name == "dialogue":
            value = jnp.where(terms["repetition"] < 0, jnp.where(known, 0.0, value), value)
        present = jnp.maximum(jnp.sum(known, axis=-1, keepdims=True), 1)
        mean = jnp.sum(jnp.where(known, value, 0), axis=-1, keepdims=True) / present
        centered = jnp.where(known, value - mean, 0.0)
        deviation = jnp.sqrt(jnp.sum(centered**2, axis=-1, keepdims=True) / present)
        # Compare with a tolerance: equal values differ from their mean by rounding errors.
        flat = jnp.ptp(jnp.where(known, value, mean), axis=-1, keepdims=True) < 1e-6
        part = jnp.where(flat, 0.0, centered / jnp.where(flat, 1.0, deviation)) if normalize else mean + centered
        total = total + weight * part
        groups = known.any(-1)
        metrics |= {
            name: jnp.mean(value, where=known),
            f"{name}_std": jnp.std(value, where=known),
            f"{name}_flat": jnp.sum(flat[..., 0] & groups) / jnp.maximum(jnp.sum(groups), 1),
            f"{name}_missing": 1 - jnp.mean(known),
        }
    return total, metrics

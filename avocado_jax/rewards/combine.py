"""All terms of captions in one pure function, and their sum.

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
ALWAYS = TERMS[:4]  # computed and logged in every run; the others where they have a weight
JUDGES = ("lexical", "embedding", "lm", "remote")  # of R_C; the first needs no model
PROBE_JUDGES = ("lm", "remote")


class Thresholds(NamedTuple):
    """What the terms leave open. Static."""

    similar: float = SIMILAR  # R_D: least similarity of two lines that may be one
    speaker: float = SPEAKER  # R_D: least share of a speaker's description
    low: float = LOW  # R_C, lexical: covered share of a keypoint that counts for nothing
    high: float = HIGH  # R_C, lexical: and in full
    order: float = ORDER  # R_C, lexical: what telling in the wrong order costs
    length_low: int = 2048  # R_L: tokens up to which a caption may go
    length_high: int = 4096  # R_L: and at which nothing is left
    min_span: int = MIN_SPAN  # RepCol: characters of a stretch that counts
    long_units: bool = False  # RepCol: repeated sentences of 100 to 400 characters count too


DEFAULTS = Thresholds()


class References(NamedTuple):
    """What captions of B clips are scored against: leaves have a leading axis of clips."""

    dialogue: Dialogue
    keypoints: Keypoints
    events: Events | None = None  # None: captions have no term `timing`


class Scored(NamedTuple):
    """One caption scored, with what led to it.

    Attributes:
        terms: raw values by name: R_C, R_D and R_L from 0 to 1, NaN without a reference; `repetition` is -1 for a
            caption that collapses and 0 for any other; `truncated` is 1 where it was too long for the limits; `timing`
            where the reference has room for events, and `probes` where a judge was asked, both from 0 to 1; those of a
            user.
        keypoints: the judge's answers.
        verdict, pairs: what the lexical judge and R_D saw.
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
    """References of clips as arrays, and bool [B], which of them were truncated.

    Args:
        clips: of each, "caption", "dialogues", "keypoints" and "events", each of which may be absent or None. Dialogues
            that are not there are read from the caption.
        limits: `quotes` and `line` hold for dialogues too.
        keypoints: most keypoints a clip; `distinct`: most distinct features of them; `alphabet`: most distinct
            characters of its lines. 0: as many as these clips have.
        events: most events a clip; 0: no term `timing`.
    """
    captions = [clip.get("caption") for clip in clips]
    lists = [clip.get("keypoints") for clip in clips]
    size = keypoints or max(1, 1, *(len(one or ()) for one in lists))
    lines, truncated_lines = dialogue_references(
        table, [clip.get("dialogues") for clip in clips], captions, limits, alphabet
    )
    points, truncated_keypoints = keypoint_references(table, lists, captions, limits, size, distinct=distinct)
    if not events:
        return References(lines, points), truncated_lines | truncated_keypoints
    timed, truncated_events = event_references([clip.get("events") for clip in clips], events)
    return References(lines, points, timed), truncated_lines | truncated_keypoints | truncated_events


def missing(references: References) -> dict[str, np.ndarray]:
    """For each term that needs a reference, bool [B]: the clips that have none."""
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
    """Score one caption of so many tokens against one reference.

    Args:
        answers, probes: a judge's scores of the keypoints and of the probes; NaN without one.
        extra: a user's terms of kind "jax".
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
    """The raw value of every term for G captions of each of B clips.

    Args:
        tokens: ids; those from `lengths` on do not count. A stop id among the first `lengths` counts as a token and
            has no text.
        answers: of another judge than the lexical one.
        limits: how much of a caption is read; by default what captions of C tokens need.
        probes: scores of each clip's probes; NaN without one.
        extra: a user's terms of kind "jax".
    """
    limits = limits or limits_for(tokens.shape[-1])

    def one(ids: Array, length: Array, reference: References, *judged: Array | None) -> dict[str, Array]:
        return score(read(table, ids, length, limits), length, reference, thresholds, *judged, extra).terms

    by_caption = [None if one is None else 0 for one in (answers, probes)]
    in_group = jax.vmap(one, in_axes=(0, 0, None, *by_caption))
    return jax.vmap(in_group, in_axes=(0, 0, 0, *by_caption))(tokens, lengths, references, answers, probes)


def combine(
    terms: Mapping[str, Float[Array, "B G"]],
    weights: Mapping[str, float],
    normalize: bool = False,
    gate: bool = False,
) -> tuple[Float[Array, "B G"], dict[str, Float[Array, ""]]]:
    """The reward of each caption, and metrics of the terms.

    Args:
        terms: raw values, NaN where there is none.
        weights: of each term that counts. The paper's reward is the plain sum of checklist, dialogue and length.
        normalize: each term less its mean in the group, over its deviation there, before it is weighted, so that a
            term of small spread is not drowned (GDPO). A term without spread gives 0.
        gate: a caption that collapses has no credit for dialogue.

    A value that is missing takes the mean of its group, so that it neither helps nor hurts; a term that a whole group
    lacks adds 0 to all of it.

    Returns:
        The rewards, and for each term `NAME` (mean of what is known), `NAME_std`, `NAME_flat` (share of groups that
        know it and in which all values are the same) and `NAME_missing` (share of values).
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
        # Values that are the same differ from their mean by rounding alone.
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

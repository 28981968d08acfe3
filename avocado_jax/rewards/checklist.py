"""R_C: the share of the reference's keypoints that a caption states (paper, checklist reward), and its lexical judge.

    K  keypoints of a reference         U  distinct features of its keypoints
    F  features of a keypoint           B  blocks of ten words of a caption

A judge scores each keypoint from 0 (not stated) to 1 (stated), or NaN without an answer; R_C is the mean of the scores
that exist (`mean_score`). The `lexical` judge needs no model: the features of a keypoint are the stems of its content
words and pairs of neighbours among them, weighted by importance. The score follows from the share of this weight that
one window of 60 words of the caption contains.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.rewards.arrays import compact
from avocado_jax.rewards.limits import A_WORD
from avocado_jax.rewards.text import Caption, Limits, outline, read_texts
from avocado_jax.rewards.vocabulary import EXCLUSIVE, Table, code_points, hash_word, meaning
from avocado_jax.typing import Array, Bool, Float, Int

DIMENSIONS = ("static", "dynamic", "auditory", "spatiotemporal", "crossmodal")  # paper, checklist reward
BLOCK, WINDOW = 10, 6  # words of a block, blocks of a window
PAIRS = 0.6  # weight of a pair, of the mean of its words'
MAX_PAIR_GAP = 2  # content words of a caption at most this far from each other form a pair
LOW, HIGH = 0.35, 0.65  # covered share of a keypoint's weight at which it counts for nothing, and in full
WRONG = 0.75  # what a keypoint loses none of whose colours, sides, numbers and the like are in the window
PROSE = 0.1  # share of function words that a window of sentences has at least
ORDER = 1.0  # penalty of a keypoint that is in the wrong order with all others
KEYPOINT = Limits(characters=512, words=96, quotes=4, line=8)
SHORT = Limits(characters=128, words=32, quotes=4, line=8)  # of most keypoints
CHARACTERS = 2**13  # of the keypoints that are read at once


class Keypoints(NamedTuple):
    """What one reference's caption has to state; of several where stacked.

    Attributes:
        features: distinct hashes of all keypoints' features, sorted; the largest number behind them.
        index, weight: of each keypoint, its features' places in `features` and shares of its whole weight.
        telling: of each keypoint, shares of its colours, sides, numbers and the like (EXCLUSIVE), none for the rest.
        dimension: number in DIMENSIONS, -1 where it is not known.
        block: block of the reference caption that states it; -1 where there is none.
        count: how many keypoints there are; -1 where that is not known.
    """

    features: Int[Array, "U"]
    index: Int[Array, "K F"]
    weight: Float[Array, "K F"]
    telling: Float[Array, "K F"]
    dimension: Int[Array, "K"]
    block: Int[Array, "K"]
    count: Int[Array, ""]


class Verdict(NamedTuple):
    """The lexical judge's answers.

    Attributes:
        score: how surely each keypoint is stated.
        coverage: the share of its weight that a window holds at most.
        block: last block of the window that states it best.
        ordered: share of the other stated keypoints that come before or after it as in the reference.
    """

    score: Float[Array, "K"]
    coverage: Float[Array, "K"]
    block: Int[Array, "K"]
    ordered: Float[Array, "K"]


def keypoint_references(
    table: Table,
    keypoints: Sequence[Sequence[Mapping[str, str]] | None],
    captions: Sequence[str | None],
    limits: Limits,
    size: int,
    features: int = 64,
    distinct: int = 0,
) -> tuple[Keypoints, np.ndarray]:
    """Stack the references of clips and return which of them were truncated.

    Args:
        keypoints: of each clip, {"text", "dimension"?}; None where there is no checklist.
        captions: reference captions, which give the order of the keypoints; None: no order.
        limits: of the captions.
        size: most keypoints a clip.
        features: most features a keypoint.
        distinct: most distinct features a clip; 0: as many as these clips have.
    """
    n = len(keypoints)
    flat = [point["text"] for points in keypoints for point in (points or ())[:size]]
    hashes, weights, truncated_keypoints = _read_keypoints(table, flat, features)
    truncated = np.array([points is not None and len(points) > size for points in keypoints])
    index = np.zeros((n, size, features), np.int32)
    weight = np.zeros((n, size, features), np.float32)
    dimension = np.full((n, size), -1, np.int32)
    counts = np.array([-1 if points is None else min(len(points), size) for points in keypoints], np.int32)
    telling = np.zeros_like(weight)
    exclusive = np.isin(hashes, [hash_word(meaning(word)) for word in EXCLUSIVE.split()]) & (weights > 0)
    several, first = [], 0
    for clip, count in enumerate(np.maximum(counts, 0)):
        rows = slice(first, first + count)
        first += count
        several.append(np.unique(hashes[rows][weights[rows] > 0]))
        truncated[clip] |= truncated_keypoints[rows].any()
        index[clip, :count] = np.searchsorted(several[-1], hashes[rows])
        weight[clip, :count] = weights[rows] / np.maximum(weights[rows].sum(-1, keepdims=True), 1e-9)
        telling[clip, :count] = exclusive[rows] / np.maximum(exclusive[rows].sum(-1, keepdims=True), 1)
        dimension[clip, :count] = [_dimension(point) for point in (keypoints[clip] or ())[:count]]
    distinct = distinct or max(map(len, several), default=0)
    distinct_features = np.full((n, max(1, distinct)), 0xFFFFFFFF, np.uint32)
    for row, one, clip in zip(distinct_features, several, range(n)):
        row[: len(one)] = one[:distinct]
        truncated[clip] |= len(one) > distinct
    weight[index >= distinct_features.shape[1]] = telling[index >= distinct_features.shape[1]] = 0
    index = np.minimum(index, distinct_features.shape[1] - 1)
    made = Keypoints(distinct_features, index, weight, telling, dimension, np.full((n, size), -1, np.int32), counts)
    known = [clip for clip in range(n) if captions[clip] and counts[clip] > 0]
    for start in range(0, len(known), 64):
        clips = known[start : start + 64]
        full = [*clips, *clips[-1:] * ((1 << (len(clips) - 1).bit_length()) - len(clips))]  # few shapes
        selected = jax.tree.map(lambda leaf, full=full: leaf[full], made)
        verdict = jax.tree.map(
            lambda leaf, clips=clips: np.asarray(leaf)[: len(clips)],
            _judge(read_texts(table, [captions[clip] for clip in full], limits), selected),
        )
        made.block[clips] = np.where(verdict.score >= 0.5, verdict.block, -1)
    return made, truncated


def _dimension(point: Mapping[str, str]) -> int:
    named = point.get("dimension")
    return DIMENSIONS.index(named) if named in DIMENSIONS else -1


def _read_keypoints(table: Table, texts: Sequence[str], limit: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features' hashes and weights of each text, padded with 0, and whether it was truncated."""
    hashes, weights = np.zeros((len(texts), limit), np.uint32), np.zeros((len(texts), limit), np.float32)
    truncated = np.zeros(len(texts), bool)
    fits = [len(text) <= SHORT.characters and len(A_WORD.findall(text)) <= SHORT.words for text in texts]
    for limits, short in ((SHORT, True), (KEYPOINT, False)):
        rows = CHARACTERS // limits.characters
        places = [index for index, one in enumerate(fits) if one is short]
        for part in (places[first : first + rows] for first in range(0, len(places), rows)):
            points, lengths = code_points(
                [*(texts[index] for index in part), *[""] * (rows - len(part))], limits.characters
            )
            read = jax.tree.map(np.asarray, _read_features(table, points, lengths, limits))
            for index, made, much, more in zip(part, *read):
                kept, much = made[much > 0], much[much > 0]
                hashes[index, : len(kept)], weights[index, : len(kept)] = kept[:limit], much[:limit]
                truncated[index] = len(kept) > limit or (more and not short)
    return hashes, weights, truncated


@partial(jax.jit, static_argnums=3)
def _read_features(table: Table, points: Array, lengths: Array, limits: Limits) -> tuple[Array, Array, Array]:
    """Of each text the hashes and weights of its words and neighbours, and whether it has more words than fit."""

    def one(points: Array, length: Array) -> tuple[Array, Array, Array]:
        read = outline(table, points, length, limits)
        hashes, weights, _ = features(read.words.stems, read.words.weights, read.unstated)
        return hashes[:2], weights[:2], read.count > limits.words

    return jax.vmap(one)(points, lengths)


def features(
    stems: Int[Array, "W"], weights: Float[Array, "W"], unstated: Bool[Array, "W"]
) -> tuple[Int[Array, "3 W"], Float[Array, "3 W"], Int[Array, "W"]]:
    """Hashes and weights (0: none) of content words and of pairs at distances one and two, and where each begins."""
    size = len(stems)
    stems = stems ^ jnp.where(unstated, jnp.uint32(0x5BD1E995), jnp.uint32(0))
    order, count = compact(weights > 0, jnp.arange(size, dtype=jnp.int32), size)
    stems, weights = stems[order], jnp.where(jnp.arange(size) < count, weights[order], 0)
    hashes, much = [stems], [weights]
    for gap in range(1, MAX_PAIR_GAP + 1):
        second = jnp.pad(stems[gap:], (0, gap))
        both = jnp.pad(weights[gap:], (0, gap))
        hashes.append(stems * jnp.uint32(0x85EBCA6B) + second * jnp.uint32(0xC2B2AE35))
        much.append(jnp.where((weights > 0) & (both > 0), PAIRS * (weights + both) / 2, 0))
    return jnp.stack(hashes), jnp.stack(much), order


def lexical(
    caption: Caption, keypoints: Keypoints, low: float = LOW, high: float = HIGH, order: float = ORDER
) -> Verdict:
    """How surely a caption states each keypoint, by its words.

    The share of a keypoint's weight that a window of six blocks of words holds, at the best window, goes from nothing
    at `low` to all at `high`. A window without the keypoint's colours, sides or numbers counts for less, and so does
    one with hardly a function word: a list, not sentences. A word that is denied, or one of several alternatives, is
    another word. Where the reference caption states a keypoint too, it loses up to `order` for being told on the wrong
    side of the others.
    """
    hashes, weights, word = features(caption.stems, caption.weights, caption.unstated)
    size = len(caption.stems)
    blocks, distinct = -(-size // BLOCK), len(keypoints.features)
    at = jnp.minimum(jnp.searchsorted(keypoints.features, hashes), distinct - 1)
    known = (keypoints.features[at] == hashes) & (weights > 0)
    flat = jnp.where(known, (word // BLOCK * distinct)[None] + at, blocks * distinct)
    present = jnp.zeros(blocks * distinct + 1, bool).at[flat].set(True)[:-1].reshape(blocks, distinct)
    real = jnp.arange(size) < caption.words
    function = _by_block(real & (caption.weights <= 0), blocks)
    all_words = _by_block(real, blocks)
    present, function, all_words = (
        _window(jnp.logical_or, present),
        _window(jnp.add, function),
        _window(jnp.add, all_words),
    )
    prose = jnp.clip(function / jnp.maximum(PROSE * all_words, 1e-9), 0, 1)
    each = jnp.arange(len(keypoints.index))[:, None]
    shares = jnp.zeros((2, distinct, len(keypoints.index)), jnp.float32)
    shares = (
        shares.at[0, keypoints.index, each].add(keypoints.weight).at[1, keypoints.index, each].add(keypoints.telling)
    )
    covered, telling = jnp.matmul(present.astype(jnp.float32), shares, precision="highest")
    wrong = jnp.sum(keypoints.telling, axis=-1)[None] - telling
    answers = jnp.clip((covered * prose[:, None] - low) / (high - low), 0, 1) * (1 - WRONG * wrong)
    score = jnp.max(answers, axis=0)
    block = jnp.argmax(answers + covered > jnp.max(answers + covered, axis=0, keepdims=True) - 1e-6, axis=0)
    coverage = jnp.max(covered * prose[:, None], axis=0)
    ordered = _in_order(block, score, keypoints.block)
    return Verdict(score * (1 - order * (1 - ordered)), coverage, block, ordered)


_judge = jax.jit(jax.vmap(lexical))


def _by_block(mask: Bool[Array, "W"], blocks: int) -> Int[Array, "B"]:
    return jnp.pad(mask, (0, blocks * BLOCK - len(mask))).reshape(blocks, BLOCK).sum(-1)


def _window(join, values: Array) -> Array:
    """Each block with the five before it."""
    made = values
    for k in range(1, WINDOW):
        earlier = jnp.pad(values, [(k, 0)] + [(0, 0)] * (values.ndim - 1))[: len(values)]
        made = join(made, earlier)
    return made


def _in_order(block: Int[Array, "K"], score: Float[Array, "K"], truth: Int[Array, "K"]) -> Float[Array, "K"]:
    """The share of the other keypoints in both captions that are before or after this one as in the reference."""
    stated = (score >= 0.5) & (truth >= 0)
    difference = truth[:, None] - truth[None]
    counts = stated[:, None] & stated[None] & (jnp.abs(difference) > 1)
    right = counts & (jnp.sign(block[:, None] - block[None]) * jnp.sign(difference) >= 0)
    pairs = jnp.sum(counts, axis=-1)
    return jnp.where(pairs > 0, jnp.sum(right, axis=-1) / jnp.maximum(pairs, 1), 1.0)


def mean_score(scores: Float[Array, "K"], count: Int[Array, ""]) -> Float[Array, ""]:
    """R_C from a judge's answers: their mean; NaN where there is no keypoint or no answer."""
    answered = (jnp.arange(len(scores)) < count) & ~jnp.isnan(scores)
    total = jnp.sum(jnp.where(answered, scores, 0))
    return jnp.where(answered.any(), total / jnp.maximum(jnp.sum(answered), 1), jnp.nan)


def dimension_scores(scores: Float[Array, "K"], keypoints: Keypoints) -> Float[Array, "5"]:
    """The mean of the answers in each of DIMENSIONS; NaN where there are none."""
    answered = (jnp.arange(len(scores)) < keypoints.count) & ~jnp.isnan(scores)
    here = answered[None] & (keypoints.dimension[None] == jnp.arange(len(DIMENSIONS))[:, None])
    total = jnp.sum(jnp.where(here, jnp.nan_to_num(scores), 0), axis=-1)
    return jnp.where(here.any(-1), total / jnp.maximum(here.sum(-1), 1), jnp.nan)

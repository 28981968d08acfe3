"""R_C: the share of the reference's keypoints that a caption states (paper, checklist reward), and its lexical judge.

    K  keypoints of a reference         U  distinct features of its keypoints
    F  features of a keypoint           B  blocks of ten words of a caption

A judge scores each keypoint from 0 (not stated) to 1 (stated), or NaN without an answer. R_C is the mean of the
available scores (`mean_score`). The `lexical` judge needs no model. The features of a keypoint are the stems of its
content words and of neighbouring pairs of them, with weights. The score is a function of the largest share of this
weight in any window of 60 words of the caption.
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
PAIRS = 0.6  # weight of a pair, relative to the mean weight of its words
MAX_PAIR_GAP = 2  # maximum distance, in content words, of the words of a pair
LOW, HIGH = 0.35, 0.65  # covered share of a keypoint's weight with score 0 and with score 1
WRONG = 0.75  # penalty if the window has none of the keypoint's colours, sides, numbers etc. (EXCLUSIVE)
PROSE = 0.1  # minimum share of function words of a window of sentences
ORDER = 1.0  # penalty of a keypoint in the wrong order relative to all others
KEYPOINT = Limits(characters=512, words=96, quotes=4, line=8)
SHORT = Limits(characters=128, words=32, quotes=4, line=8)  # sufficient for most keypoints
CHARACTERS = 2**13  # characters of the keypoints parsed in one call


class Keypoints(NamedTuple):
    """The keypoints of one reference, or of several if stacked.

    Attributes:
        features: sorted distinct hashes of all keypoints' features, padded with the largest integer.
        index: indices of each keypoint's features in `features`.
        weight: shares of each keypoint's features in its total weight.
        telling: shares of each keypoint's colours, sides, numbers etc. (EXCLUSIVE); 0 for other features.
        dimension: index in DIMENSIONS; -1 if unknown.
        block: block of the reference caption that states the keypoint; -1 if none.
        count: number of keypoints; -1 if unknown.
    """

    features: Int[Array, "U"]
    index: Int[Array, "K F"]
    weight: Float[Array, "K F"]
    telling: Float[Array, "K F"]
    dimension: Int[Array, "K"]
    block: Int[Array, "K"]
    count: Int[Array, ""]


class Verdict(NamedTuple):
    """The lexical judge's results.

    Attributes:
        score: score of each keypoint, from 0 (not stated) to 1 (stated).
        coverage: largest share of the keypoint's weight in any window.
        block: last block of the window with the best score.
        ordered: share of the other stated keypoints in the same order relative to this one as in the reference.
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
        keypoints: {"text", "dimension"?} of each clip; None without a checklist.
        captions: reference captions, which determine the order of the keypoints; None: no order.
        limits: limits of the captions.
        size: maximum keypoints per clip.
        features: maximum features per keypoint.
        distinct: maximum distinct features per clip; 0: the maximum of these clips.
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
    distinct_hashes, first = [], 0
    for clip, count in enumerate(np.maximum(counts, 0)):
        rows = slice(first, first + count)
        first += count
        distinct_hashes.append(np.unique(hashes[rows][weights[rows] > 0]))
        truncated[clip] |= truncated_keypoints[rows].any()
        index[clip, :count] = np.searchsorted(distinct_hashes[-1], hashes[rows])
        weight[clip, :count] = weights[rows] / np.maximum(weights[rows].sum(-1, keepdims=True), 1e-9)
        telling[clip, :count] = exclusive[rows] / np.maximum(exclusive[rows].sum(-1, keepdims=True), 1)
        dimension[clip, :count] = [_dimension(point) for point in (keypoints[clip] or ())[:count]]
    distinct = distinct or max(map(len, distinct_hashes), default=0)
    distinct_features = np.full((n, max(1, distinct)), 0xFFFFFFFF, np.uint32)
    for row, found, clip in zip(distinct_features, distinct_hashes, range(n)):
        row[: len(found)] = found[:distinct]
        truncated[clip] |= len(found) > distinct
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
    """Hash and weigh the features of each text, padded with 0; also return which texts were truncated."""
    hashes, weights = np.zeros((len(texts), limit), np.uint32), np.zeros((len(texts), limit), np.float32)
    truncated = np.zeros(len(texts), bool)
    fits = [len(text) <= SHORT.characters and len(A_WORD.findall(text)) <= SHORT.words for text in texts]
    for limits, short in ((SHORT, True), (KEYPOINT, False)):
        rows = CHARACTERS // limits.characters
        places = [index for index, fit in enumerate(fits) if fit is short]
        for part in (places[first : first + rows] for first in range(0, len(places), rows)):
            points, lengths = code_points(
                [*(texts[index] for index in part), *[""] * (rows - len(part))], limits.characters
            )
            read = jax.tree.map(np.asarray, _read_features(table, points, lengths, limits))
            for index, made, weight, more in zip(part, *read):
                kept, weight = made[weight > 0], weight[weight > 0]
                hashes[index, : len(kept)], weights[index, : len(kept)] = kept[:limit], weight[:limit]
                truncated[index] = len(kept) > limit or (more and not short)
    return hashes, weights, truncated


@partial(jax.jit, static_argnums=3)
def _read_features(table: Table, points: Array, lengths: Array, limits: Limits) -> tuple[Array, Array, Array]:
    """Hashes and weights of each text's words and neighbouring pairs, and whether it exceeds the word limit."""

    def read_one(points: Array, length: Array) -> tuple[Array, Array, Array]:
        read = outline(table, points, length, limits)
        hashes, weights, _ = features(read.words.stems, read.words.weights, read.unstated)
        return hashes[:2], weights[:2], read.count > limits.words

    return jax.vmap(read_one)(points, lengths)


def features(
    stems: Int[Array, "W"], weights: Float[Array, "W"], unstated: Bool[Array, "W"]
) -> tuple[Int[Array, "3 W"], Float[Array, "3 W"], Int[Array, "W"]]:
    """Hashes and weights (0: none) of content words and of pairs at distances one and two, and their first words."""
    size = len(stems)
    stems = stems ^ jnp.where(unstated, jnp.uint32(0x5BD1E995), jnp.uint32(0))
    order, count = compact(weights > 0, jnp.arange(size, dtype=jnp.int32), size)
    stems, weights = stems[order], jnp.where(jnp.arange(size) < count, weights[order], 0)
    hashes, all_weights = [stems], [weights]
    for gap in range(1, MAX_PAIR_GAP + 1):
        second = jnp.pad(stems[gap:], (0, gap))
        second_weights = jnp.pad(weights[gap:], (0, gap))
        hashes.append(stems * jnp.uint32(0x85EBCA6B) + second * jnp.uint32(0xC2B2AE35))
        all_weights.append(jnp.where((weights > 0) & (second_weights > 0), PAIRS * (weights + second_weights) / 2, 0))
    return jnp.stack(hashes), jnp.stack(all_weights), order


def lexical(
    caption: Caption, keypoints: Keypoints, low: float = LOW, high: float = HIGH, order: float = ORDER
) -> Verdict:
    """Score from the words of a caption how surely it states each keypoint.

    The score is the largest share of a keypoint's weight in any window of six blocks, on a linear ramp from 0 at `low`
    to 1 at `high`. It is reduced for windows without the keypoint's colours, sides or numbers, and for windows with
    few function words (lists instead of sentences). Words that are denied or are alternatives do not match. If the
    reference caption states the keypoint too, the score is reduced by up to `order` for the wrong order relative to
    the other keypoints.
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
    """Combine each block with the five previous ones."""
    made = values
    for k in range(1, WINDOW):
        earlier = jnp.pad(values, [(k, 0)] + [(0, 0)] * (values.ndim - 1))[: len(values)]
        made = join(made, earlier)
    return made


def _in_order(block: Int[Array, "K"], score: Float[Array, "K"], truth: Int[Array, "K"]) -> Float[Array, "K"]:
    """The share of the other keypoints, stated in both captions, that have the reference's order to this one."""
    stated = (score >= 0.5) & (truth >= 0)
    difference = truth[:, None] - truth[None]
    counts = stated[:, None] & stated[None] & (jnp.abs(difference) > 1)
    right = counts & (jnp.sign(block[:, None] - block[None]) * jnp.sign(difference) >= 0)
    pairs = jnp.sum(counts, axis=-1)
    return jnp.where(pairs > 0, jnp.sum(right, axis=-1) / jnp.maximum(pairs, 1), 1.0)


def mean_score(scores: Float[Array, "K"], count: Int[Array, ""]) -> Float[Array, ""]:
    """Compute R_C, the mean of a judge's scores; NaN without a keypoint or a score."""
    answered = (jnp.arange(len(scores)) < count) & ~jnp.isnan(scores)
    total = jnp.sum(jnp.where(answered, scores, 0))
    return jnp.where(answered.any(), total / jnp.maximum(jnp.sum(answered), 1), jnp.nan)


def dimension_scores(scores: Float[Array, "K"], keypoints: Keypoints) -> Float[Array, "5"]:
    """The mean score of each of DIMENSIONS; NaN without a score."""
    answered = (jnp.arange(len(scores)) < keypoints.count) & ~jnp.isnan(scores)
    here = answered[None] & (keypoints.dimension[None] == jnp.arange(len(DIMENSIONS))[:, None])
    total = jnp.sum(jnp.where(here, jnp.nan_to_num(scores), 0), axis=-1)
    return jnp.where(here.any(-1), total / jnp.maximum(here.sum(-1), 1), jnp.nan)

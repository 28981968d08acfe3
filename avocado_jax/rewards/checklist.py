"""R_C: the share of the reference's keypoints that a caption states (paper, checklist reward), and its lexical judge.

    K  keypoints of a reference         U  distinct features of its keypoints
    F  features of a keypoint           B  blocks of ten words of a caption

A judge says of each keypoint how surely the caption states it, 0 to 1, NaN where it has no answer; R_C is the mean of
the answers there are (`mean_score`). The `lexical` judge needs no model: the features of a keypoint are the stems of
its content words and pairs of neighbours among them, weighted by how much each says; it is stated as far as one window
of 60 words of the caption holds them.
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
APART = 2  # content words of a caption this far apart are a pair still
LOW, HIGH = 0.35, 0.65  # covered share of a keypoint's weight at which it counts for nothing, and in full
WRONG = 0.75  # what a keypoint loses none of whose colours, sides, numbers and the like are in the window
PROSE = 0.1  # share of function words that a window of sentences has at least
ORDER = 1.0  # what a keypoint loses that is told on the wrong side of all others
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
        place: block of the reference caption at which it has been stated; -1 where there is none.
        count: how many keypoints there are; -1 where that is not known.
    """

    features: Int[Array, "U"]
    index: Int[Array, "K F"]
    weight: Float[Array, "K F"]
    telling: Float[Array, "K F"]
    dimension: Int[Array, "K"]
    place: Int[Array, "K"]
    count: Int[Array, ""]


class Verdict(NamedTuple):
    """The lexical judge's answers.

    Attributes:
        score: how surely each keypoint is stated.
        coverage: the share of its weight that a window holds at most.
        place: the block at which the window ends where it is told best.
        ordered: of the other stated keypoints, the share that is told on the same side of it as in the reference.
    """

    score: Float[Array, "K"]
    coverage: Float[Array, "K"]
    place: Int[Array, "K"]
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
    """References of clips, stacked, and which of them were cut to fit.

    Args:
        keypoints: of each clip, {"text", "dimension"?}; None where there is no checklist.
        captions: reference captions, which tell the order of the keypoints; None leaves it open.
        limits: of the captions.
        size: room for so many keypoints a clip.
        features: room for so many features a keypoint.
        distinct: room for so many distinct features a clip; 0 takes what these need.
    """
    n = len(keypoints)
    flat = [point["text"] for own in keypoints for point in (own or ())[:size]]
    hashes, weights, cut_points = _read_keypoints(table, flat, features)
    cut = np.array([own is not None and len(own) > size for own in keypoints])
    index = np.zeros((n, size, features), np.int32)
    weight = np.zeros((n, size, features), np.float32)
    dimension = np.full((n, size), -1, np.int32)
    counts = np.array([-1 if own is None else min(len(own), size) for own in keypoints], np.int32)
    telling = np.zeros_like(weight)
    exclusive = np.isin(hashes, [hash_word(meaning(word)) for word in EXCLUSIVE.split()]) & (weights > 0)
    several, first = [], 0
    for clip, count in enumerate(np.maximum(counts, 0)):
        own = slice(first, first + count)
        first += count
        several.append(np.unique(hashes[own][weights[own] > 0]))
        cut[clip] |= cut_points[own].any()
        index[clip, :count] = np.searchsorted(several[-1], hashes[own])
        weight[clip, :count] = weights[own] / np.maximum(weights[own].sum(-1, keepdims=True), 1e-9)
        telling[clip, :count] = exclusive[own] / np.maximum(exclusive[own].sum(-1, keepdims=True), 1)
        dimension[clip, :count] = [_dimension(point) for point in (keypoints[clip] or ())[:count]]
    distinct = distinct or max(map(len, several), default=0)
    room = np.full((n, max(1, distinct)), 0xFFFFFFFF, np.uint32)
    for row, one, clip in zip(room, several, range(n)):
        row[: len(one)] = one[:distinct]
        cut[clip] |= len(one) > distinct
    weight[index >= room.shape[1]] = telling[index >= room.shape[1]] = 0
    index = np.minimum(index, room.shape[1] - 1)
    made = Keypoints(room, index, weight, telling, dimension, np.full((n, size), -1, np.int32), counts)
    known = [clip for clip in range(n) if captions[clip] and counts[clip] > 0]
    for start in range(0, len(known), 64):
        clips = known[start : start + 64]
        full = [*clips, *clips[-1:] * ((1 << (len(clips) - 1).bit_length()) - len(clips))]  # few shapes
        own = jax.tree.map(lambda leaf, full=full: leaf[full], made)
        verdict = jax.tree.map(
            lambda leaf, clips=clips: np.asarray(leaf)[: len(clips)],
            _judge(read_texts(table, [captions[clip] for clip in full], limits), own),
        )
        made.place[clips] = np.where(verdict.score >= 0.5, verdict.place, -1)
    return made, cut


def _dimension(point: Mapping[str, str]) -> int:
    named = point.get("dimension")
    return DIMENSIONS.index(named) if named in DIMENSIONS else -1


def _read_keypoints(table: Table, texts: Sequence[str], room: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each text its features' hashes and weights, 0 behind them, and whether it was cut."""
    hashes, weights = np.zeros((len(texts), room), np.uint32), np.zeros((len(texts), room), np.float32)
    cut = np.zeros(len(texts), bool)
    fits = [len(text) <= SHORT.characters and len(A_WORD.findall(text)) <= SHORT.words for text in texts]
    for limits, short in ((SHORT, True), (KEYPOINT, False)):
        rows = CHARACTERS // limits.characters
        places = [place for place, one in enumerate(fits) if one is short]
        for part in (places[first : first + rows] for first in range(0, len(places), rows)):
            points, lengths = code_points(
                [*(texts[place] for place in part), *[""] * (rows - len(part))], limits.characters
            )
            read = jax.tree.map(np.asarray, _read_features(table, points, lengths, limits))
            for place, made, much, more in zip(part, *read):
                own, much = made[much > 0], much[much > 0]
                hashes[place, : len(own)], weights[place, : len(own)] = own[:room], much[:room]
                cut[place] = len(own) > room or (more and not short)
    return hashes, weights, cut


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
    """Hashes and weights (0: none) of content words and of pairs one and two apart, and where each begins."""
    size = len(stems)
    stems = stems ^ jnp.where(unstated, jnp.uint32(0x5BD1E995), jnp.uint32(0))
    order, count = compact(weights > 0, jnp.arange(size, dtype=jnp.int32), size)
    stems, weights = stems[order], jnp.where(jnp.arange(size) < count, weights[order], 0)
    hashes, much = [stems], [weights]
    for gap in range(1, APART + 1):
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
    held = jnp.zeros(blocks * distinct + 1, bool).at[flat].set(True)[:-1].reshape(blocks, distinct)
    real = jnp.arange(size) < caption.words
    function = _by_block(real & (caption.weights <= 0), blocks)
    all_words = _by_block(real, blocks)
    held, function, all_words = _window(jnp.logical_or, held), _window(jnp.add, function), _window(jnp.add, all_words)
    prose = jnp.clip(function / jnp.maximum(PROSE * all_words, 1e-9), 0, 1)
    each = jnp.arange(len(keypoints.index))[:, None]
    shares = jnp.zeros((2, distinct, len(keypoints.index)), jnp.float32)
    shares = (
        shares.at[0, keypoints.index, each].add(keypoints.weight).at[1, keypoints.index, each].add(keypoints.telling)
    )
    covered, telling = jnp.matmul(held.astype(jnp.float32), shares, precision="highest")
    wrong = jnp.sum(keypoints.telling, axis=-1)[None] - telling
    answers = jnp.clip((covered * prose[:, None] - low) / (high - low), 0, 1) * (1 - WRONG * wrong)
    score = jnp.max(answers, axis=0)
    place = jnp.argmax(answers + covered > jnp.max(answers + covered, axis=0, keepdims=True) - 1e-6, axis=0)
    coverage = jnp.max(covered * prose[:, None], axis=0)
    ordered = _in_order(place, score, keypoints.place)
    return Verdict(score * (1 - order * (1 - ordered)), coverage, place, ordered)


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


def _in_order(place: Int[Array, "K"], score: Float[Array, "K"], truth: Int[Array, "K"]) -> Float[Array, "K"]:
    """Of the keypoints that both captions state and the reference clearly before or after this one, those told so."""
    stated = (score >= 0.5) & (truth >= 0)
    side = truth[:, None] - truth[None]
    counts = stated[:, None] & stated[None] & (jnp.abs(side) > 1)
    right = counts & (jnp.sign(place[:, None] - place[None]) * jnp.sign(side) >= 0)
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

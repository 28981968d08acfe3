"""R_C: the lexical judge against a plain count of words in windows, and missing verdicts."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sizes import ONE

from avocado_jax.rewards import text, vocabulary
from avocado_jax.rewards.checklist import (
    BLOCK,
    HIGH,
    LOW,
    PAIRS,
    WINDOW,
    WRONG,
    _read_keypoints,
    dimension_scores,
    keypoint_references,
    lexical,
    mean_score,
)

WORDS = (
    "the",
    "a",
    "is",
    "of",
    "dog",
    "barks",
    "red",
    "car",
    "left",
    "moves",
    "girl",
    "sings",
    "tree",
    "quickly",
    "door",
)
SENTENCES = st.lists(st.sampled_from(WORDS), min_size=1, max_size=120).map(" ".join)
POINTS = st.lists(st.lists(st.sampled_from(WORDS), min_size=1, max_size=8).map(" ".join), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def table():
    return vocabulary.make_table()


@jax.jit
def judge(caption, keypoints):
    return jax.vmap(lexical)(caption, keypoints)


def score_keypoints(table, caption, points, reference=None):
    keypoints, truncated = keypoint_references(
        table, [[{"text": point} for point in points]], [reference], ONE, 8, distinct=64
    )
    assert not truncated[0]
    verdict = judge(text.read_texts(table, [caption], ONE), keypoints)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[0, : len(points)], verdict)


WEIGHTS = vocabulary.word_weights([])
EXCLUSIVE = set(map(vocabulary.meaning, vocabulary.EXCLUSIVE.split()))


def reference_score(caption, point):
    """Coverage and score of a keypoint over all windows, in plain Python."""
    words = [vocabulary.meaning(word) for word in vocabulary.words_of(caption)]
    weigh = [WEIGHTS.get(word, WEIGHTS[""]) for word in words]
    content = [(index, word) for index, (word, weight) in enumerate(zip(words, weigh)) if weight > 0]
    present = [(index // BLOCK, word) for index, word in content]
    for gap in (1, 2):
        present += [(one[0] // BLOCK, (one[1], other[1])) for one, other in zip(content, content[gap:])]
    keypoint_words = [
        word for word in map(vocabulary.meaning, vocabulary.words_of(point)) if WEIGHTS.get(word, WEIGHTS[""]) > 0
    ]
    much = {word: WEIGHTS.get(word, WEIGHTS[""]) for word in keypoint_words}
    wanted = [(word, much[word]) for word in keypoint_words]
    wanted += [((one, other), PAIRS * (much[one] + much[other]) / 2) for one, other in pairwise(keypoint_words)]
    telling = [word for word in keypoint_words if word in EXCLUSIVE]
    best, answer = 0.0, 0.0
    for last in range(-(-ONE.words // BLOCK)):
        window = range(last - WINDOW + 1, last + 1)
        inside = {what for block, what in present if block in window}
        there = weigh[max(window[0], 0) * BLOCK : (last + 1) * BLOCK]
        prose = min(1.0, sum(weight <= 0 for weight in there) / max(0.1 * len(there), 1e-9))
        covered = prose * sum(w for what, w in wanted if what in inside) / max(sum(w for _, w in wanted), 1e-9)
        wrong = sum(word not in inside for word in telling) / max(len(telling), 1)
        best = max(best, covered)
        answer = max(answer, min(max((covered - LOW) / (HIGH - LOW), 0), 1) * (1 - WRONG * wrong))
    return best, answer


@settings(max_examples=25)
@given(SENTENCES, POINTS)
def test_scores_equal_a_reference_over_all_windows(table, caption, points):
    verdict = score_keypoints(table, caption, points)
    expected = [reference_score(caption, point) for point in points]
    np.testing.assert_allclose(verdict.coverage, [one for one, _ in expected], atol=1e-5)
    np.testing.assert_allclose(verdict.score, [one for _, one in expected], atol=1e-4)


STATEMENTS = "The red car moves to the left. A girl sings behind the door. The dog barks at a tree."


@pytest.mark.parametrize(
    ("point", "contrary"),
    [
        ("The red car moves to the left.", "The green car moves to the left."),
        ("The red car moves to the left.", "The red car moves to the right."),
        ("A girl sings behind the door.", "A boy sings behind the door."),
        ("The dog barks at a tree.", "No dog barks at a tree."),
        ("The dog barks at a tree.", "The dog never barks at a tree."),
    ],
)
def test_contradictions_score_lower(table, point, contrary):
    true, untrue = score_keypoints(table, STATEMENTS, [point, contrary]).score
    assert true == 1
    assert untrue < 0.7


def test_wrong_order_costs_if_the_reference_gives_the_order(table):
    pairs = {"stone": "desk", "lamp": "bed", "chair": "roof", "book": "sea"}
    points = [f"A {thing} falls on the {location}." for thing, location in pairs.items()]
    between = " It is what it is and so it was, and it will be what it was, as it is here and there."
    ordered = "".join(point + between for point in points)
    backwards = "".join(point + between for point in reversed(points))
    assert score_keypoints(table, ordered, points, ordered).score.tolist() == [1, 1, 1, 1]
    assert score_keypoints(table, backwards, points).score.tolist() == [1, 1, 1, 1]  # no order is known
    assert score_keypoints(table, backwards, points, ordered).score.max() < 0.1


def test_keypoints_of_any_length_keep_their_positions(table):
    """Short and long keypoints are parsed by two programs; too long ones are truncated."""
    words = [f"{one}{other}" for one in ("bam", "dor", "fil", "gan", "hop") for other in ("ta", "mo", "ru", "ki", "pe")]
    texts = ["a dog barks", " ".join(words), "the red car", "go " * 97, "to " * 40]
    hashes, weights, truncated = _read_keypoints(table, texts, 64)
    assert truncated.tolist() == [False, False, False, True, False]
    for text_, hashed, much in zip(texts[:3], hashes, weights):
        content = {vocabulary.hash_word(vocabulary.meaning(word)) for word in text_.split() if word not in ("a", "the")}
        assert content <= set(hashed[much > 0].tolist())
        assert (much > 0).sum() == 2 * len(content) - 1  # words and neighbours


def test_absent_verdicts_are_nan_not_zero():
    nan = float("nan")
    scores = jnp.array([1.0, nan, 0.0, nan, 5.0])
    assert float(mean_score(scores, 4)) == 0.5
    assert np.isnan(mean_score(scores, 0))
    assert np.isnan(mean_score(jnp.full(5, nan), 5))


def test_dimensions_of_keypoints(table):
    points = [
        {"text": "A dog barks.", "dimension": "auditory"},
        {"text": "A car.", "dimension": "static"},
        {"text": "x"},
    ]
    keypoints, _ = keypoint_references(table, [points], [None], ONE, 4)
    found = dimension_scores(jnp.array([1.0, float("nan"), 0.0, 7.0]), jax.tree.map(lambda leaf: leaf[0], keypoints))
    np.testing.assert_array_equal(found, [np.nan, np.nan, 1, np.nan, np.nan])

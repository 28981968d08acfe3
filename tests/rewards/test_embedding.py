"""The sentence encoder as judge: the nearest window counts, on a ramp; padding does not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.rewards.embedding import embedding_scores

VECTORS = np.random.default_rng(0).standard_normal((50, 16)).astype(np.float32)


def embed(tokens, valid):
    """A fake encoder: normalised bag of valid tokens."""
    mean = jnp.sum(jnp.asarray(VECTORS)[tokens] * valid[..., None], axis=-2)
    return mean / jnp.maximum(1e-9, jnp.linalg.norm(mean, axis=-1, keepdims=True))


def padded_ids(*lists, size=6):
    """Lists of ids as padded arrays; the padding is noise."""
    tokens = np.random.default_rng(len(lists)).integers(0, 50, (len(lists), size))
    for row, ids in zip(tokens, lists):
        row[: len(ids)] = ids
    return tokens, np.arange(size) < np.array([len(ids) for ids in lists])[:, None]


def cosine(one, other):
    """Cosine similarity in NumPy."""
    one, other = VECTORS[one].sum(axis=0), VECTORS[other].sum(axis=0)
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


WINDOWS = [[1, 2, 3], [4, 5], [], [6, 7, 8, 9]]
KEYPOINTS = [[4, 5], [1, 2], [6, 9, 30], [40, 41], []]


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.9), (0.5, 0.5), (-1.0, 1.0)])
def test_scores_equal_a_numpy_reference(low, high):
    score = partial(embedding_scores, embed, low=low, high=high)
    best = [max(cosine(words, window) for window in WINDOWS if window) for words in KEYPOINTS[:4]]
    expected = [float(one >= low) if low == high else np.clip((one - low) / (high - low), 0, 1) for one in best]
    windows, keypoints = padded_ids(*WINDOWS), padded_ids(*KEYPOINTS)
    for way in (score, jax.jit(score)):
        scores = way(*windows, *keypoints)
        assert scores.dtype == jnp.float32
        np.testing.assert_allclose(scores[:4], expected, atol=1e-6)
        assert np.isnan(scores[4])
    assert len({round(float(one), 3) for one in best}) == 4

    # A group of captions against one list of keypoints, as training has them.
    other = padded_ids([40, 41], [], [], [])
    group = [np.stack(pair) for pair in zip(windows, other)]
    together = jax.vmap(score, in_axes=(0, 0, None, None))(*group, *keypoints)
    np.testing.assert_allclose(together[0], score(*windows, *keypoints), atol=1e-6)
    assert together[1, 3] == 1


def test_empty_caption_scores_zero():
    scores = embedding_scores(embed, *padded_ids([], []), *padded_ids([1], [2, 3]), low=-1.0, high=0.5)
    np.testing.assert_array_equal(scores, [0, 0])

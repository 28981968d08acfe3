"""Attention against a plain softmax, whole and in chunks, and the merging of its parts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.models import attention
from avocado_jax.models.attention import attend, merge

ROWS, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH = 2, 50, 70, 4, 2, 8


def draws(seed=0, queries=QUERIES):
    """q [B Q H E], k and v [B K S E]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (ROWS, queries, HEADS, WIDTH), *[(ROWS, KV_HEADS, KEYS, WIDTH)] * 2
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def plain(q, k, v, valid=None, causal=False):
    """The formula, head by head."""
    k, v = (jnp.repeat(part, HEADS // KV_HEADS, axis=1) for part in (k, v))
    scores = jnp.einsum("bqhe,bhse->bqhs", q, k) / WIDTH**0.5
    seen = jnp.ones((ROWS, q.shape[1], 1, k.shape[2]), bool)
    if valid is not None:
        seen &= valid[:, None, None]
    if causal:
        seen &= (jnp.arange(k.shape[2]) <= jnp.arange(q.shape[1])[:, None])[None, :, None]
    scores = jnp.where(seen, scores, -jnp.inf)
    return jnp.einsum("bqhs,bhse->bqhe", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("score_bytes", [1, 2**28])  # in chunks of 16 queries, or at once
def test_is_the_formula(monkeypatch, causal, masked, score_bytes):
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    q, k, v = draws()
    valid = jnp.arange(KEYS) < jnp.array([[KEYS - 9], [33]]) if masked else None
    for ours, theirs in zip(attend(q, k, v, valid, causal), plain(q, k, v, valid, causal)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)

    def loss(run):
        return lambda *qkv: sum(jnp.sum(jnp.sin(part)) for part in run(*qkv, valid, causal))

    for ours, theirs in zip(*(jax.grad(loss(run), argnums=(0, 1, 2))(q, k, v) for run in (attend, plain))):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_parts_merge_into_one_softmax():
    q, k, v = draws()
    parts = [attend(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 31), slice(31, 32), slice(32, None))]
    nothing = attend(q, k, v, jnp.zeros((ROWS, KEYS), bool))  # has no weight, and is finite
    assert np.isfinite(nothing[0]).all()
    np.testing.assert_allclose(merge([*parts, nothing]), plain(q, k, v)[0], atol=2e-6)

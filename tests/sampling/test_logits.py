"""Truncation against transformers' warpers; samples against their probabilities."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torchvision_ops  # noqa: F401 (must come before transformers' generation)
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper

from avocado_jax.sampling.logits import Sampling, draw, truncate

LOGITS = np.random.default_rng(0).standard_normal((50, 97)).astype(np.float32) * 3


@pytest.mark.parametrize(
    ("top_k", "top_p"), [(0, 1.0), (1, 1.0), (5, 1.0), (97, 1.0), (500, 1.0), (0, 0.5), (0, 0.99), (0, 1e-6), (7, 0.8)]
)
def test_top_k_and_top_p_equal_transformers(top_k, top_p):
    theirs = torch.tensor(LOGITS)
    if top_k:
        theirs = TopKLogitsWarper(top_k)(None, theirs)
    if top_p < 1:
        theirs = TopPLogitsWarper(top_p)(None, theirs)
    ours = truncate(jnp.asarray(LOGITS), Sampling(1.0, top_k, top_p))
    np.testing.assert_array_equal(np.asarray(ours) > -1e29, np.isfinite(theirs.numpy()))
    kept = np.isfinite(theirs.numpy())
    np.testing.assert_array_equal(np.asarray(ours)[kept], LOGITS[kept])


def test_samples_follow_the_probabilities():
    """In 20,000 samples, each token's share is within five standard errors, and banned tokens never occur."""
    logits, temperature, count = jnp.asarray(LOGITS[0, :20]), 0.7, 20_000
    banned = jnp.arange(20) % 5 == 2
    keys = jax.random.split(jax.random.key(1), count)
    sample = jax.jit(jax.vmap(lambda key: draw(logits, banned, key, Sampling(temperature))))
    tokens, logprobs = sample(keys)
    expected = np.asarray(jax.nn.softmax(jnp.where(banned, -jnp.inf, logits / temperature)))
    share = np.bincount(np.asarray(tokens), minlength=20) / count
    assert not share[np.asarray(banned)].any()
    assert (np.abs(share - expected) <= 5 * np.sqrt(expected * (1 - expected) / count) + 1e-12).all()
    stated = jax.nn.log_softmax(logits / temperature)[tokens]  # before bans: what a trainer computes
    np.testing.assert_allclose(logprobs, stated, rtol=1e-5)


def test_temperature_zero_is_greedy():
    banned = np.zeros(97, bool)
    banned[LOGITS[3].argmax()] = True
    token, logprob = draw(jnp.asarray(LOGITS[3]), jnp.asarray(banned), jax.random.key(0), Sampling(0.0))
    best = np.where(banned, -np.inf, LOGITS[3]).argmax()
    assert token == best
    np.testing.assert_allclose(logprob, jax.nn.log_softmax(LOGITS[3])[best], rtol=1e-5)


@pytest.mark.parametrize("wrong", [{"temperature": -1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}])
def test_invalid_sampling_options_are_refused(wrong):
    with pytest.raises(ValueError, match="need temperature 0"):
        Sampling(**wrong)

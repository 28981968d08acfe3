"""The chunked cross-entropy against optax's over whole logits."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avocado_jax.train import losses
from avocado_jax.typing import Captions

B, G, C, D, V = 3, 2, 13, 8, 50


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, G, C)).astype(np.int32)
    captions = Captions(targets, targets, rng.random((B, G, C)) < 0.7)
    weight = np.array([1, 0, 1], np.float32)
    hidden, head = rng.normal(size=(B, G, C, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    return hidden, head, captions, weight


def whole(hidden, head, captions, weight):
    logits = hidden @ head.T
    each = optax.softmax_cross_entropy_with_integer_labels(logits, captions.targets)
    return jnp.sum(each * captions.valid * weight[:, None, None])


def chunked(hidden, head, captions, weight):
    return losses.caption_sums(hidden, lambda x: x @ head.T, captions, weight)


@pytest.mark.parametrize("stretch", [1, 5, 13, 100])
def test_equals_the_loss_over_whole_logits(case, stretch, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * V * B * G * stretch)
    hidden, head, captions, weight = case
    sums = chunked(*case)
    np.testing.assert_allclose(sums.loss, whole(*case), rtol=1e-6)
    counts = captions.valid * weight[:, None, None]
    assert float(sums.count) == counts.sum()
    assert float(sums.correct) == ((np.argmax(hidden @ head.T, -1) == captions.targets) * counts).sum()
    ours = jax.grad(lambda *args: chunked(*args, captions, weight).loss, (0, 1))(hidden, head)
    theirs = jax.grad(partial(whole, captions=captions, weight=weight), (0, 1))(hidden, head)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_whole_logits_never_exist(case, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * V * B * G * 3)
    text = str(jax.make_jaxpr(lambda *args: jax.grad(lambda h: chunked(h, *args[1:]).loss)(args[0]))(*case))
    assert f"[{B},{G},3,{V}]" in text
    assert f"[{B},{G},{C},{V}]" not in text

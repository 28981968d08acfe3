"""The chunked loss against optax over full logits, on one device and sharded over meshes."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train import losses
from avocado_jax.typing import Captions

B, G, C, D, V = 3, 2, 13, 8, 48


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, V, (B, G, C)).astype(np.int32)
    captions = Captions(targets, targets, rng.random((B, G, C)) < 0.7)
    weight = np.array([1, 0, 1], np.float32)
    hidden, head = rng.normal(size=(B, G, C, D)).astype(np.float32), rng.normal(size=(V, D)).astype(np.float32)
    return hidden, head, captions, weight


def full_loss(hidden, head, captions, weight):
    logits = hidden @ head.T
    each = optax.softmax_cross_entropy_with_integer_labels(logits, captions.targets)
    return jnp.sum(each * captions.valid * weight[:, None, None])


@pytest.mark.parametrize("stretch", [1, 5, 13, 100])
def test_chunked_loss_equals_the_loss_over_full_logits(case, stretch, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * V * B * G * stretch)
    hidden, head, captions, weight = case
    totals = losses.loss_totals(*case)
    np.testing.assert_allclose(totals.loss, full_loss(*case), rtol=1e-6)
    counts = captions.valid * weight[:, None, None]
    assert float(totals.count) == counts.sum()
    assert float(totals.correct) == ((np.argmax(hidden @ head.T, -1) == captions.targets) * counts).sum()
    ours = jax.grad(lambda *args: losses.loss_totals(*args, captions, weight).loss, (0, 1))(hidden, head)
    theirs = jax.grad(partial(full_loss, captions=captions, weight=weight), (0, 1))(hidden, head)
    for one, other in zip(ours, theirs):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def test_full_logits_never_exist(case, monkeypatch):
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * V * B * G * 3)
    text = str(jax.make_jaxpr(jax.grad(lambda *args: losses.loss_totals(*args).loss))(*case))
    assert f"[{B * G * 3},{V}]" in text
    assert f"[{B * G * C},{V}]" not in text
    assert f"[{B},{G},{C},{V}]" not in text
    assert f"f32[{D},{V // losses.PIECES}]" in text  # nor the full gradient of the output matrix
    assert f"f32[{D},{V}]" not in text


def scores_of_full_logits(hidden, head, targets, temperature):
    """`caption_scores` from full logits."""
    logits = hidden @ head.T / temperature
    logprobs = jax.nn.log_softmax(logits)
    chosen = jnp.take_along_axis(logprobs, targets[..., None], axis=-1)[..., 0]
    entropy = -jnp.sum(jnp.exp(logprobs) * logprobs, axis=-1)
    return losses.Scores(chosen, entropy, jnp.argmax(logits, axis=-1) == targets)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 2, 2), (1, 8, 1), (1, 2, 4)])
@pytest.mark.parametrize("vocabulary", [48, V])  # divided by `tensor`, or not
def test_scores_on_every_mesh_with_temperature(case, sizes, vocabulary, monkeypatch):
    """Scores and gradients in at least two chunks; no mesh divides the three rows evenly."""
    hidden, head, captions, _ = case
    head, targets = head[:vocabulary], captions.targets % vocabulary
    hidden[0, 0, 0] = 3 * head[targets[0, 0, 0]]  # large logits: the target is the likeliest
    upstream = np.random.default_rng(1).normal(size=targets.shape).astype(np.float32)

    def run(scores_of):
        def loss(hidden, head):
            scores = scores_of(hidden, head, targets, 0.7)
            return jnp.sum(scores.logprob * upstream) + jnp.sum(jax.lax.stop_gradient(scores.entropy)), scores

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(hidden, head)

    expected = run(scores_of_full_logits)
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * vocabulary * 7)
    with jax.set_mesh(make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])):
        found = run(losses.caption_scores)
    for one, other in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(one, other, rtol=2e-5, atol=2e-5)


def test_bf16_loss_is_near_fp32(case):
    """In bfloat16 the gradient of the output matrix is accumulated in fp32 over chunks, and returned in bfloat16."""
    hidden, head, captions, weight = case

    def gradients(dtype):
        loss = lambda hidden, head: losses.loss_totals(hidden.astype(dtype), head, captions, weight).loss  # noqa: E731
        return jax.grad(loss, (0, 1))(hidden, head)

    for gradient, other in zip(gradients(jnp.bfloat16), gradients(jnp.float32)):
        assert gradient.dtype == jnp.float32
        assert np.abs(gradient - other).max() < 0.02 * np.abs(other).max()

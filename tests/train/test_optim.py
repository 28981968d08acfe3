"""The optimizer against NumPy, update by update; skipped updates; gradient accumulation."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.config import GrpoConfig, OptimConfig
from avocado_jax.train import grpo, sft
from avocado_jax.train.losses import LossTotals
from avocado_jax.train.optim import MATRICES, gradient, optimizer, schedule
from avocado_jax.train.state import State, apply_gradient, initial_state

STEPS = 12
CONFIG = OptimConfig(lr=3e-2, warmup=0.25, final=0.1, beta1=0.8, beta2=0.9, eps=1e-3, weight_decay=0.3, clip_norm=0.7)


def parameters():
    """A leaf of each kind, in the layout of the model."""
    rng = np.random.default_rng(0)
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "text": {"q_proj": {"kernel": draw(3, 4), "bias": draw(4), "lora_a": draw(3, 2), "lora_b": draw(2, 4)}},
        "norm": {"scale": draw(4)},
        "embedding": draw(5, 3),
        "head": draw(3, 5),
    }


def learning_rate(config, n):
    """Learning rate of update n (from 1): linear over W updates, then a cosine that reaches `final` at update N + 1."""
    warmup = max(1, round(config.warmup * STEPS))
    if n <= warmup:
        return config.lr * n / warmup
    progress = (n - warmup) / (STEPS + 1 - warmup)
    return config.lr * (config.final + (1 - config.final) * (1 + np.cos(np.pi * progress)) / 2)


@pytest.mark.parametrize("warmup", [0.0, 0.25])
@pytest.mark.parametrize("scale", [0.01, 10.0])  # of the gradients: clipping inactive, active
def test_updates_equal_numpy(warmup, scale):
    config, rng = replace(CONFIG, warmup=warmup), np.random.default_rng(1)
    params, make = parameters(), optimizer(config, STEPS)
    state, update = make.init(params), jax.jit(make.update)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert sum(any(f"'{name}'" in path for name in MATRICES) for path in paths) == 5
    expected = jax.tree.leaves(params)
    first, second = ([np.zeros_like(leaf) for leaf in expected] for _ in range(2))
    for n in range(1, STEPS + 1):
        grads = jax.tree.map(lambda leaf: scale * rng.normal(size=leaf.shape).astype(np.float32), params)
        updates, state = update(grads, state, params)
        params = jax.tree.map(np.add, params, updates)
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(grads)]
        norm = np.sqrt(sum((leaf**2).sum() for leaf in leaves))
        assert (norm > config.clip_norm) == (scale > 1)
        for i, g in enumerate(leaves):
            g = g * min(1, config.clip_norm / norm)
            first[i] = config.beta1 * first[i] + (1 - config.beta1) * g
            second[i] = config.beta2 * second[i] + (1 - config.beta2) * g**2
            step = first[i] / (1 - config.beta1**n) / (np.sqrt(second[i] / (1 - config.beta2**n)) + config.eps)
            decay = config.weight_decay * expected[i] if expected[i].ndim == 2 else 0
            expected[i] = expected[i] - learning_rate(config, n) * (step + decay)
        for path, one, other in zip(paths, jax.tree.leaves(params), expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5, err_msg=f"{path}, update {n}")


@pytest.mark.parametrize("warmup", [0.0, 0.05, 0.25, 1.0])
def test_learning_rate_schedules(warmup):
    config = replace(CONFIG, warmup=warmup)
    rate = schedule(config, STEPS)
    found = [float(rate(number)) for number in range(STEPS)]
    np.testing.assert_allclose(found, [learning_rate(config, n) for n in range(1, STEPS + 1)], rtol=1e-5)
    assert found[0] == pytest.approx(config.lr / max(1, round(warmup * STEPS)))
    assert max(found) == pytest.approx(config.lr)
    assert float(schedule(config, 1)(0)) == pytest.approx(config.lr)  # a run of one step


def test_skipped_update_changes_only_counters():
    params, make = parameters(), optimizer(CONFIG, STEPS)
    state = initial_state(params, make, "all")
    bad = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), params)
    after, _ = jax.jit(apply_gradient, static_argnums=(3, 4))(state, bad, jnp.array(False), make, "all")
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer), (params, state.optimizer))
    assert (int(after.skipped), int(after.in_row)) == (1, 1)


def test_update_without_rows_changes_nothing():
    """Momentum and weight decay do not move the parameters; it is not counted as skipped."""
    params, make = parameters(), optimizer(CONFIG, STEPS)
    state, once = initial_state(params, make, "all"), jax.jit(apply_gradient, static_argnums=(3, 4))
    state, _ = once(state, jax.tree.map(np.ones_like, params), jnp.array(True), make, "all")
    none = jax.tree.map(np.zeros_like, params)
    after, _ = once(state, none, jnp.array(True), make, "all", jnp.array(False))
    jax.tree.map(np.testing.assert_array_equal, (after.params, after.optimizer), (state.params, state.optimizer))
    assert (int(after.skipped), int(after.in_row)) == (0, 0)
    moved, _ = once(state, none, jnp.array(True), make, "all", jnp.array(True))
    assert any((one != other).any() for one, other in zip(*map(jax.tree.leaves, (moved.params, state.params))))


LOSS, GRADIENT = np.array([[1, 0], [1, 1], [np.nan, 1], [1, np.nan]], np.float32).T


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_steps_skip_non_finite_updates_and_log_the_learning_rate(monkeypatch, stage, number):
    """A NaN in the loss or in the gradient alone is enough. Skipped updates do not advance the schedule."""
    loss, value = jnp.asarray(LOSS[number]), GRADIENT[number]
    params, make, rate = {"kernel": np.ones((2, 2), np.float32)}, optimizer(CONFIG, STEPS), schedule(CONFIG, STEPS)
    grads = jax.tree.map(lambda leaf: jnp.full_like(leaf, value), params)
    state = initial_state(params, make, "all")._replace(step=jnp.int32(5), skipped=jnp.int32(3))
    weight = np.ones(2, np.float32)
    options = dict(model=None, adamw=make, rate=rate)
    if stage == "sft":
        monkeypatch.setattr(sft, "gradient", lambda *_: (grads, LossTotals(loss, jnp.ones(()), jnp.ones(()))))
        captions = sft.Captions(*[np.ones((2, 1, 3), bool)] * 3)
        clip = sft.Clip(**dict.fromkeys(sft.Clip._fields))._replace(length=np.ones(2))
        after, metrics = sft.sft_step(state, clip, captions, weight, train="all", accumulate=1, **options)
    else:
        zeros = grpo.ObjectiveTotals(**dict.fromkeys(grpo.ObjectiveTotals._fields, jnp.ones(())))
        totals = grpo._UpdateTotals(zeros, jnp.ones(()), jnp.ones(()))
        monkeypatch.setattr(grpo, "batch_gradient", lambda *_, **__: (grads, loss, totals))
        rollout = grpo.Rollout(None, None, np.ones((2, 4)), np.ones((2, 4)))
        clip = grpo.Clip(**dict.fromkeys(grpo.Clip._fields))._replace(length=np.ones(2))
        batch = grpo.Experience(clip, None, rollout, None, None, weight)
        after, metrics = grpo.grpo_update(state, batch, config=GrpoConfig(train="all"), **options)
    finite = np.isfinite(loss + value)
    assert int(after.skipped) == 3 + (not finite)
    changed = jax.tree.map(lambda one, other: (one != other).any(), after.params, params)
    assert any(jax.tree.leaves(changed)) == finite
    assert float(metrics["lr"]) == float(rate(2))
    assert isinstance(after, State)
    assert int(after.step) == 6


def test_the_gradient_does_not_depend_on_the_number_of_microbatches():
    rng = np.random.default_rng(0)
    weights, x = rng.normal(size=3).astype(np.float32), rng.normal(size=(8, 3)).astype(np.float32)

    def loss(weights, x):
        total = jnp.sum((x @ weights) ** 2)
        return total, total

    (whole, totals), (parts, totals_of_parts) = (gradient(loss, weights, (x,), number) for number in (1, 4))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)
    np.testing.assert_allclose(totals_of_parts, totals, rtol=1e-5)
    np.testing.assert_allclose(whole, 2 * x.T @ (x @ weights), rtol=1e-5)

"""Replacement of groups with equal rewards by spare groups: selection, position and weight."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.spares import Sampled, choose, replacement

B, G = 4, 2


def rewards(*equal):
    """Rewards of clips whose captions have equal rewards, or not."""
    return jnp.array([[0.5, 0.5 if one else 1.5] for one in equal])


def make_batch(first, weight=(1, 1, 1, 1), split=1):
    """A batch whose leaves count its rows from `first`."""
    rows = first + jnp.arange(B * split, dtype=jnp.float32)
    counts = jnp.repeat(jnp.array(weight, jnp.float32), split)
    return Sampled(rows, None, rows[:, None], rows[:, None] * jnp.ones((1, G // split)), counts)


@pytest.fixture(scope="module")
def replaced():
    mesh = make_mesh(2, 2, 1, devices=jax.devices()[:4])
    run = replacement(mesh)

    def call(*args):
        with jax.set_mesh(mesh):
            learned, *rest = run(*args)
        for part in (learned.clip, learned.rollout[:, 0], learned.advantage[:, 0]):  # all leaves alike
            np.testing.assert_array_equal(part, learned.clip)
        return learned, *rest

    return call


def test_spares_are_used_in_order():
    rng = np.random.default_rng(0)
    for _ in range(50):
        equal, usable = rng.random(6) < 0.5, rng.random(4) < 0.5
        spare, taken = choose(jnp.array(equal), jnp.array(usable))
        waiting, expected = list(np.flatnonzero(usable)), np.full(6, -1)
        for group in np.flatnonzero(equal):
            expected[group] = waiting.pop(0) if waiting else -1
        np.testing.assert_array_equal(spare, expected)
        assert set(np.flatnonzero(taken)) == set(expected[expected >= 0])


def test_groups_of_equal_rewards_are_replaced(replaced):
    """Used, equal and lost spares are not taken; a lost clip is not replaced."""
    batch, reward = make_batch(0, (1, 1, 0, 1)), rewards(True, False, True, True)
    spares = make_batch(10, (1, 0, 1, 1)), make_batch(20)
    spare_rewards = rewards(False, False, True, False), rewards(False, False, False, False)
    spent = jnp.array([True] + [False] * 7)
    learned, taken, now, metrics = replaced(batch, reward, spares, spare_rewards, spent)
    assert learned.clip.tolist() == [13, 1, 2, 20]
    assert learned.weight.tolist() == [1, 1, 0, 1]
    assert np.flatnonzero(taken).tolist() == [3, 4]
    assert np.flatnonzero(now).tolist() == [0, 3, 4]
    assert {name: int(value) for name, value in metrics.items()} == {
        "replaced": 2,
        "dropped": 0,
        "all_equal": 0,
        "rows": 3,
    }


def test_group_without_a_spare_has_zero_weight(replaced):
    batch, nothing = make_batch(0), jnp.ones(4, bool)
    learned, taken, _, metrics = replaced(
        batch, rewards(True, False, True, False), (make_batch(10),), (rewards(*[0] * 4),), nothing
    )
    assert learned.clip.tolist() == [0, 1, 2, 3]
    assert learned.weight.tolist() == [0, 1, 0, 1]
    assert not taken.any()
    assert (int(metrics["dropped"]), int(metrics["all_equal"])) == (2, 0)
    learned, *_, metrics = replaced(batch, rewards(*[True] * 4), (make_batch(10),), (rewards(*[1] * 4),), ~nothing)
    assert not learned.weight.any()
    assert (int(metrics["dropped"]), int(metrics["all_equal"]), float(metrics["rows"])) == (4, 1, 4)
    lost = make_batch(0, (0, 0, 0, 0))
    *_, metrics = replaced(lost, rewards(*[True] * 4), (make_batch(10),), (rewards(*[1] * 4),), ~nothing)
    assert (int(metrics["dropped"]), int(metrics["all_equal"])) == (0, 0)


def test_all_rows_of_a_clip_are_replaced(replaced):
    batch, spares = make_batch(0, split=2), (make_batch(10, split=2),)
    reward, other = rewards(False, True, False, False), (rewards(True, True, True, False),)
    learned, *_ = replaced(batch, reward, spares, other, jnp.zeros(4, bool))
    assert learned.clip.tolist() == [0, 1, 16, 17, 4, 5, 6, 7]

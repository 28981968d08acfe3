"""Rewards of a step and of held-out captions, without a model: rows of a clip, normalisation, missing values."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.config import GrpoConfig, RewardConfig
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.rewards.vocabulary import make_table
from avocado_jax.train import rewards as run_rewards
from avocado_jax.train.programs import StepShapes
from avocado_jax.train.reward_evaluation import heldout_totals
from avocado_jax.train.rewards import make_rewards
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run_grpo import _step
from avocado_jax.typing import Captions

NAMES = ("checklist", "dialogue", "length", "repetition")


@pytest.fixture
def rewards_of(monkeypatch):
    """Config -> its rewards on one device."""
    monkeypatch.setattr(run_rewards, "make_table", lambda *_: make_table())
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    source = SimpleNamespace(index=SimpleNamespace(ids=[]))
    setup = SimpleNamespace(mesh=mesh, source=source, words=SimpleNamespace(json=None))
    return lambda config: (setup, make_rewards(config, setup, (), {}))


def known_lengths(captions, references):
    """A host term without a verdict on the second caption."""
    return [None if number == 1 else float(reference["seconds"]) for number, reference in enumerate(references)]


def wrong(captions, references):
    raise OSError("no such caption")


def test_users_term_is_combined_by_its_weight(rewards_of, monkeypatch):
    """A caption without a verdict gets the mean of its group; weight 0 only logs the term."""
    extra = ("host:test_rewarded:known_lengths=0.5", "host:test_rewarded:wrong=0")
    monkeypatch.setattr(run_rewards, "caption_text", lambda setup, stops, ids: f"{len(ids)}")
    _, rewards = rewards_of(GrpoConfig(rewards=RewardConfig(extra=extra)))
    terms = dict.fromkeys(NAMES, np.zeros((1, 3), np.float32)) | {"wrong": np.full((1, 3), 7.0)}
    reward, metrics = rewards.combine(terms | {"known_lengths": np.array([[2, np.nan, 4]])}, np.ones(1))
    assert reward.tolist() == [[1, 1.5, 2]]
    assert [float(metrics[name]) for name in ("known_lengths", "known_lengths_missing", "wrong")] == pytest.approx(
        [3, 1 / 3, 7]
    )
    shape = jax.ShapeDtypeStruct((1, 3, 5), jnp.int32)
    program = rewards.program(Rollout(Captions(shape, shape, shape), shape, shape, shape))
    assert {name: leaf.shape for name, leaf in program.args[4].items()} == {"known_lengths": (1, 3), "wrong": (1, 3)}
    # --- the values of a rollout, and the exception of one of the terms
    tokens, lengths = jnp.ones((2, 3, 5), jnp.int32), jnp.full((2, 3), 5)
    batch = SimpleNamespace(weight=jnp.array([0.0, 1.0]), records=({}, {"seconds": 3}))
    judged = rewards.judge(Rollout(Captions(tokens, tokens, tokens), tokens, lengths, lengths), batch)()
    np.testing.assert_array_equal(judged["known_lengths"].answers, [[np.nan] * 3, [3, np.nan, 3]])
    with pytest.raises(RuntimeError, match="host:test_rewarded:wrong failed: no such caption"):
        rewards.check(judged)


@pytest.mark.parametrize("normalize", [False, True])
def test_held_out_rewards_are_plain_weighted_sums(rewards_of, normalize):
    """Also if training normalises each term in its group, since greedy captions have no group."""
    weights = dict(checklist=1.0, dialogue=2.0, length=0.5, repetition=1.0)
    _, rewards = rewards_of(GrpoConfig(rewards=RewardConfig(normalize=normalize, **weights)))
    values = np.random.default_rng(0).random((4, 5, 1)).astype(np.float32)
    values[1, 2] = np.nan  # no reference: adds nothing
    terms, weight = dict(zip(NAMES, values)), np.array([1, 1, 1, 0, 1], np.float32)
    found = jax.jit(partial(heldout_totals, rewards))(terms, np.full((5, 1), 7), weight)
    counts = np.flatnonzero(weight)
    expected = sum(weights[name] * np.nan_to_num(terms[name])[counts].sum() for name in NAMES)
    assert float(found["reward"][0]) == pytest.approx(expected, rel=1e-5)
    assert int(found["reward"][1]) == 4
    assert [int(found["reward_dialogue"][1]), int(found["reward_length"][1])] == [3, 4]
    assert float(found["reward_dialogue"][0]) == pytest.approx(np.nansum(values[1, counts]), rel=1e-5)
    assert [float(part) for part in found["length"]] == [28, 4]


def test_training_normalises_terms_if_configured(rewards_of):
    terms = {name: np.arange(8, dtype=np.float32).reshape(2, 4) * number for number, name in enumerate(NAMES)}
    for normalize, spread in ((False, 0.0 + 1 + 2), (True, 2 / np.std(np.arange(4)))):
        _, rewards = rewards_of(GrpoConfig(rewards=RewardConfig(normalize=normalize)))
        reward, _ = rewards.combine(terms, np.ones(2))
        assert float(reward[0, 1] - reward[0, 0]) == pytest.approx(spread, rel=1e-5)


def test_weights_of_clips_with_several_rows(rewards_of):
    """Three clips of two rows; the middle clip was lost and does not affect the metrics."""
    config = GrpoConfig(batch=3, group=4, split=2)
    setup, rewards = rewards_of(config)
    rows = rows_sharding(setup.mesh)
    shape = jax.ShapeDtypeStruct((6, 2, 5), jnp.int32, sharding=rows)
    count = jax.ShapeDtypeStruct((6, 2), jnp.int32, sharding=rows)
    weight = jax.ShapeDtypeStruct((6,), jnp.float32, sharding=rows)
    rollout = Rollout(Captions(shape, shape, shape), shape, count, count)

    def program(rollout):
        score = jax.jit(lambda lengths: dict.fromkeys(NAMES, lengths * 1.0))
        return Program("rewards", score, (rollout.lengths,))

    rewards = rewards._replace(program=program)
    _, programs = _step(config, setup, None, rewards, {}, None, (), "")
    shapes = StepShapes((None, None, weight, None), None, None, rollout)
    (group_advantages,) = [one.run for one in programs(shapes) if one.name == "advantages"]
    terms = dict(zip(NAMES, np.random.default_rng(0).random((4, 6, 2)).astype(np.float32)))
    terms["length"][2:4] = 100
    reward, advantage, metrics = group_advantages(terms, np.array([1, 1, 0, 0, 1, 1], np.float32))
    by_clip = sum(terms[name].reshape(3, 4) for name in NAMES[:3])
    assert float(metrics["reward"]) == pytest.approx(by_clip[[0, 2]].mean(), rel=1e-5)
    assert float(metrics["reward_length"]) == pytest.approx(terms["length"].reshape(3, 4)[[0, 2]].mean(), rel=1e-5)
    np.testing.assert_allclose(reward[0], by_clip[0], rtol=1e-5)
    centred = by_clip - by_clip.mean(1, keepdims=True)
    expected = (centred / by_clip.std(1, ddof=1, keepdims=True)).reshape(6, 2)[[0, 1, 4, 5]]
    np.testing.assert_allclose(advantage[jnp.array([0, 1, 4, 5])], expected, rtol=1e-4)

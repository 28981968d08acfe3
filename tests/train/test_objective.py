"""Each part of the objective against its formula in NumPy, and the full objective against TRL."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.config import ObjectiveConfig
from avocado_jax.errors import InputError
from avocado_jax.train import objective as o

B, G, C = 3, 4, 6
TRL = np.load(Path(__file__).with_name("trl_losses.npz"))
AGGREGATES = {"grpo": "sequence", "dapo": "token", "dr_grpo": "constant"}


@pytest.fixture
def case():
    """Log-probabilities and ragged captions: an empty one, one of one token, one of maximum length."""
    rng = np.random.default_rng(1)
    new, old, reference, sampled = (-rng.exponential(1, (B, G, C)).astype(np.float32) for _ in range(4))
    lengths = rng.integers(1, C + 1, (B, G))
    lengths[0, :3] = 0, 1, C
    return new, old, reference, sampled, np.arange(C) < lengths[..., None], lengths


def assert_close(found, expected):
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


def test_advantages_equal_numpy():
    rng = np.random.default_rng(0)
    rewards = rng.random((B, G)).astype(np.float32)
    for g in range(B):
        mean, std = rewards[g].mean(), np.sqrt(((rewards[g] - rewards[g].mean()) ** 2).sum() / (G - 1))
        for i in range(G):
            assert_close(o.mean_advantage(rewards)[g, i], rewards[g, i] - mean)
            assert_close(o.std_advantage(rewards, 1e-3)[g, i], (rewards[g, i] - mean) / std)
            assert_close(o.std_advantage(rewards, 10.0)[g, i], (rewards[g, i] - mean) / 10)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 2.7])
@pytest.mark.parametrize("group", [3, 7, 8])
def test_equal_rewards_have_zero_advantage(reward, group):
    rewards = np.full((2, group), reward, np.float32)
    rewards[1, 0] += 1
    for advantage in (o.mean_advantage(rewards), o.std_advantage(rewards, 1e-30), o.std_advantage(rewards, 1e-3)):
        assert (np.asarray(advantage)[0] == 0).all()
        assert (np.asarray(advantage)[1] != 0).all()
    assert o.zero_variance(rewards).tolist() == [True, False]


def test_rounding_residue_has_zero_advantage():
    rewards = np.full((1, 8), 1.0, np.float32)
    rewards[0, 0] = np.nextafter(np.float32(1), np.float32(2))
    assert np.abs(o.std_advantage(rewards, 1e-3)).max() < 1e-3
    assert np.abs(o.std_advantage(rewards, 1e-30)).max() > 1  # what it would be


def test_group_of_one_has_zero_advantage():
    assert (np.asarray(o.std_advantage(np.ones((2, 1), np.float32), 1e-3)) == 0).all()


def test_ratios_equal_numpy(case):
    new, old, _, _, valid, lengths = case
    token, sequence = o.token_log_ratio(new, old, valid), o.sequence_log_ratio(new, old, valid)
    for b, g, c in np.ndindex(B, G, C):
        length = lengths[b, g]
        assert_close(token[b, g, c], new[b, g, c] - old[b, g, c] if c < length else 0)
        mean = sum(new[b, g, t] - old[b, g, t] for t in range(length)) / length if length else 0
        assert_close(sequence[b, g, c], mean)


def test_clipping_equals_numpy():
    ratio, low, high = np.array([0.5, 0.79, 0.81, 1.0, 1.29, 1.31, 3.0], np.float32), 0.2, 0.3
    for advantage in (2.0, -2.0, 0.0):
        expected = [min(r * advantage, min(max(r, 0.8), 1.3) * advantage) for r in ratio]
        assert_close(o.clipped(ratio, jnp.float32(advantage), low, high), expected)
    slope = jax.vmap(jax.grad(lambda r, a: o.clipped(r, a, low, high)), (0, None))
    assert np.asarray(slope(ratio, 2.0) != 0).tolist() == [True] * 5 + [False] * 2
    assert np.asarray(slope(ratio, -2.0) != 0).tolist() == [False] * 2 + [True] * 5
    assert o.clipped(jnp.float32(1.5), 1.0, 0.2, 0.0) == 1  # a bound of 0 is a bound


def test_truncated_importance_weights_equal_numpy(case):
    _, old, _, sampled, valid, _ = case
    for cap in (1.0, 2.0):
        found = o.truncated_importance(old, sampled, valid, cap)
        for index in np.ndindex(B, G, C):
            assert_close(found[index], min(np.exp(old[index] - sampled[index]), cap) if valid[index] else 1)


def test_kl_estimators_equal_numpy():
    d = np.linspace(-3, 3, 13).astype(np.float32)  # log p_ref - log p
    for found, expected in ((o.k1, -d), (o.k2, d**2 / 2), (o.k3, np.exp(d) - d - 1)):
        assert_close(found(d), expected)
        assert found(jnp.float32(0)) == 0


def test_kl_estimators_agree_in_expectation():
    """Over samples from p, k1 and k3 are unbiased, and k2 nearly so for close distributions."""
    rng = np.random.default_rng(0)
    p = jax.nn.log_softmax(rng.normal(size=20))
    q = jax.nn.log_softmax(p + 0.1 * rng.normal(size=20))
    true = float(np.sum(np.exp(p) * (p - q)))
    for estimate, tolerance in ((o.k1, 1e-3), (o.k3, 1e-3), (o.k2, 0.1)):
        assert float(np.sum(np.exp(p) * estimate(q - p))) == pytest.approx(true, rel=tolerance)


def test_token_weights_of_each_aggregation(case):
    *_, valid, lengths = case
    counted = np.ones((B, G), np.float32)
    counted[2] = 0
    valid = valid & (counted > 0)[..., None]
    lengths = lengths * (counted > 0)
    captions = 2 * G
    found = {name: shares(valid, counted, 10) for name, shares in o.SHARES.items()}
    for b, g, c in np.ndindex(B, G, C):
        here = c < lengths[b, g]
        assert_close(found["sequence"][b, g, c], 1 / lengths[b, g] / captions if here else 0)
        assert_close(found["token"][b, g, c], 1 / lengths.sum() if here else 0)
        assert_close(found["constant"][b, g, c], 1 / (captions * 10) if here else 0)


def test_token_weights_of_an_empty_batch_are_zero():
    nothing = np.zeros((B, G, C), bool)
    for shares in o.SHARES.values():
        assert (np.asarray(shares(nothing, np.zeros((B, G), np.float32), 10)) == 0).all()


def test_overlong_captions_are_masked(case):
    *_, valid, lengths = case
    truncated = lengths == C
    found = np.asarray(o.without_overlong(valid, truncated))
    assert truncated.any() and not truncated.all()  # noqa: PT018
    np.testing.assert_array_equal(found[~truncated], valid[~truncated])
    assert not found[truncated].any()


@pytest.mark.parametrize("number", range(12))
def test_loss_gradient_and_clipped_shares_equal_trl(number):
    """Loss, gradient and shares of clipped tokens of GRPO, DAPO, Dr. GRPO, with token and sequence ratios (GSPO).

    TRL weights the policy loss only, so the KL is added without weights.
    """
    loss, level, beta = str(TRL["cases"][number]).split()
    length = TRL["new"].shape[-1]
    config = ObjectiveConfig(
        ratio=level, clip_low=0.2, clip_high=0.28, beta=0.0, aggregate=AGGREGATES[loss], importance_cap=2.0
    )
    unweighted = replace(config, importance_cap=0.0)
    valid, counted = TRL["valid"], np.ones(TRL["valid"].shape[:2], np.float32)
    shares = o.SHARES[config.aggregate](valid, counted, length + 2)
    assert_close(o.advantages(TRL["rewards"], config), TRL["advantage"] * _trl_std(TRL["rewards"]))

    def full_objective(new):
        others = [TRL[name] for name in ("old", "sampled", "reference", "advantage")]
        policy, totals = o.objective(new, *others, valid, shares, config)
        both, none = (
            o.objective(new, *others, valid, shares, replace(unweighted, beta=weight))[0]
            for weight in (float(beta), 0.0)
        )
        return policy + (both - none), totals

    (value, totals), slope = jax.value_and_grad(full_objective, has_aux=True)(TRL["new"])
    assert_close(value, TRL[f"loss_{number}"])
    np.testing.assert_allclose(slope, TRL[f"gradient_{number}"], atol=1e-6)
    assert np.abs(slope).max() > 1e-3
    if level == "token":  # with one ratio a caption TRL takes the mean over captions
        assert_close(
            [totals.clipped_low / totals.tokens, totals.clipped_high / totals.tokens], TRL[f"clipped_{number}"]
        )
        assert float(totals.clipped_low) > 0


def test_importance_weights_of_the_kl_are_those_of_the_policy_now(case):
    """Tokens that became improbable since the rollout: no exploding gradient of the KL, nor figure."""
    new, old, reference, sampled, valid, _ = case
    new = np.where(np.arange(C) % 3 == 0, sampled - 12, new).astype(np.float32)
    config = ObjectiveConfig(beta=0.5, importance_cap=1.5)
    shares = o.SHARES["token"](valid, np.ones((B, G), np.float32), C)

    def loss(new, config):
        return o.objective(new, old, sampled, reference, np.zeros((B, G), np.float32), valid, shares, config)

    (value, totals), slope = jax.value_and_grad(loss, has_aux=True)(new, config)
    weight, d = np.minimum(np.exp(new - sampled), 1.5), reference - new
    assert_close(value, 0.5 * np.sum(shares * weight * (np.exp(d) - d - 1)))
    assert_close(totals.kl, np.sum(weight * (np.exp(d) - d - 1), where=valid))
    np.testing.assert_allclose(slope, 0.5 * shares * weight * (1 - np.exp(d)), rtol=1e-4, atol=1e-7)
    plain = jax.grad(lambda new: loss(new, replace(config, importance_cap=0.0))[0])(new)
    assert np.abs(plain).max() > 1e3 * np.abs(slope).max()


def _trl_std(rewards):
    """Standard deviation as in TRL, which adds 1e-4 where we use a floor."""
    std = rewards.std(axis=1, ddof=1, keepdims=True)
    return (std + 1e-4) / std


def test_equal_rewards_give_no_gradient_of_the_policy_term(case):
    new, old, reference, sampled, valid, _ = case
    config = ObjectiveConfig(beta=0.0)
    shares = o.SHARES["sequence"](valid, np.ones((B, G), np.float32), C)
    advantage = o.advantages(np.full((B, G), 1 / 3, np.float32), config)

    def loss(new, config):
        return o.objective(new, old, sampled, reference, advantage, valid, shares, config)[0]

    assert (np.asarray(jax.grad(loss)(new, config)) == 0).all()
    assert (np.asarray(jax.grad(loss)(new, replace(config, beta=0.04))) != 0).any()


def test_masked_tokens_do_not_affect_loss_or_gradient(case):
    """Tokens after the stop with probability 1e-40 or 1 do not change a bit of loss and gradient."""
    *rest, valid, _ = case
    shares = o.SHARES["sequence"](valid, np.ones((B, G), np.float32), C)
    advantage = np.linspace(-2, 2, B * G, dtype=np.float32).reshape(B, G)

    def run(arrays):
        new, old, reference, sampled = arrays
        for ratio in o.RATIOS:
            config = ObjectiveConfig(ratio=ratio, importance_cap=2.0)
            yield jax.value_and_grad(
                lambda new, config=config: o.objective(new, old, sampled, reference, advantage, valid, shares, config)[
                    0
                ]
            )(new)

    wild = [np.where(valid, part, extreme) for part, extreme in zip(rest, (-300.0, 0.0, 0.0, -200.0))]
    for one, other in zip(run(rest), run([part.astype(np.float32) for part in wild])):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(np.where(valid, one[1], 0), other[1])


@pytest.mark.parametrize(
    "wrong", [{"kl": "k4"}, {"ratio": "word"}, {"aggregate": ""}, {"advantage": "z"}, {"beta": -1.0}, {"clip_low": 2.0}]
)
def test_unknown_names_are_refused(wrong):
    with pytest.raises(InputError, match=next(iter(wrong))):
        o.check_objective(ObjectiveConfig(**wrong))

"""The GRPO objective: advantages, ratios, clipping, KL to the reference, token weights (shares).

    loss = sum over tokens of share x (-min(ratio x A, clipped ratio x A) x old/sampler + beta x KL x new/sampler)

`importance_cap` truncates the two importance weights; 0 omits both. Without the second, a token that became improbable
since the rollout has a gradient of the KL without bound: exp(log p_ref - log p) for k3.

All arrays are fp32, [B G C] (clips, captions of each, tokens) or [B G]. Log-probabilities at masked positions may have
any finite value. Nothing here depends on the model.

GRPO: Shao et al. 2024, arXiv 2402.03300. DAPO: Yu et al. 2025, arXiv 2503.14476. Dr. GRPO: Liu et al. 2025, arXiv
2503.20783. GSPO: Zheng et al. 2025, arXiv 2507.18071. KL estimators: Schulman 2020, "Approximating KL divergence".
Truncated importance correction: Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL".
Weighted KL: DeepSeek-AI 2025, arXiv 2512.02556, 3.1 (there its weight has a gradient).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.config import ObjectiveConfig
from avocado_jax.errors import InputError
from avocado_jax.typing import Array, Bool, Float

# --- advantages


def zero_variance(rewards: Float[Array, "B G"]) -> Bool[Array, "B"]:
    """Mask of groups whose captions all have the same reward. They give no policy gradient."""
    return jnp.max(rewards, axis=1) == jnp.min(rewards, axis=1)


def mean_advantage(rewards: Float[Array, "B G"]) -> Float[Array, "B G"]:
    """A_i = r_i - mean(r) (Dr. GRPO, 3.1); exactly 0 if all rewards of a group are equal."""
    centred = rewards - jnp.mean(rewards, axis=1, keepdims=True)
    return jnp.where(zero_variance(rewards)[:, None], 0, centred)


def std_advantage(rewards: Float[Array, "B G"], floor: float) -> Float[Array, "B G"]:
    """A_i = (r_i - mean(r)) / max(std(r), floor) (GRPO, 4.1.2), with the unbiased std.

    The floor prevents rounding errors in a group of equal rewards from becoming an advantage.
    """
    if rewards.shape[1] == 1:
        return jnp.zeros_like(rewards)
    std = jnp.std(rewards, axis=1, ddof=1, keepdims=True)
    return mean_advantage(rewards) / jnp.maximum(std, floor)


# --- log ratios, [B G C]


def token_log_ratio(new: Array, old: Array, valid: Array) -> Float[Array, "B G C"]:
    """log r_t = log p_new(t) - log p_old(t) (GRPO, eq. 3); 0 at masked tokens."""
    return jnp.where(valid, new - old, 0)


def sequence_log_ratio(new: Array, old: Array, valid: Array) -> Float[Array, "B G C"]:
    """log s = 1/|o| sum_t (log p_new(t) - log p_old(t)), the same for all tokens of a caption (GSPO, eq. 7)."""
    length = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    mean = jnp.sum(token_log_ratio(new, old, valid), axis=-1, keepdims=True) / length
    return jnp.broadcast_to(mean, new.shape)


# --- the surrogate and the correction of its sampling


def clipped(ratio: Array, advantage: Array, low: float, high: float) -> Float[Array, "B G C"]:
    """min(r A, clip(r, 1 - low, 1 + high) A): pessimistic (GRPO, eq. 3), with separate bounds (DAPO, 3.1)."""
    return jnp.minimum(ratio * advantage, jnp.clip(ratio, 1 - low, 1 + high) * advantage)


def truncated_importance(logprob: Array, sampled: Array, valid: Array, cap: float) -> Float[Array, "B G C"]:
    """min(p(t) / p_sampler(t), cap): the importance weight of a sampled token, without gradient.

    Args:
        logprob: log-probabilities under the policy of the expectation.
        sampled: log-probabilities under the sampling policy, computed by the sampler.
    """
    return jax.lax.stop_gradient(jnp.minimum(jnp.exp(jnp.where(valid, logprob - sampled, 0)), cap))


# --- KL estimators, per token (Schulman 2020), from d = log p_ref - log p


def k1(d: Array) -> Array:
    """-d: unbiased, of either sign; its gradient is 0 in expectation."""
    return -d


def k2(d: Array) -> Array:
    """d^2 / 2: biased, non-negative."""
    return jnp.square(d) / 2


def k3(d: Array) -> Array:
    """exp(d) - d - 1: unbiased, non-negative (GRPO, eq. 4)."""
    return jnp.exp(d) - d - 1


# --- shares: the weight of each token in the loss, [B G C]; `counted` [B G] is 1 for captions in the batch


def sequence_shares(valid: Array, counted: Array, limit: int) -> Float[Array, "B G C"]:
    """1 / (N |o_i|): the mean over captions of the mean over tokens (GRPO, eq. 3)."""
    length = jnp.maximum(jnp.sum(valid, axis=-1, keepdims=True), 1)
    return valid / length / jnp.maximum(jnp.sum(counted), 1)


def token_shares(valid: Array, counted: Array, limit: int) -> Float[Array, "B G C"]:
    """1 / sum_i |o_i|: equal weight for all tokens, so long captions weigh more (DAPO, 3.3)."""
    return valid / jnp.maximum(jnp.sum(valid), 1.0)


def constant_shares(valid: Array, counted: Array, limit: int) -> Float[Array, "B G C"]:
    """1 / (N L), L the sampling limit: a token's weight does not depend on its caption's length (Dr. GRPO, 3.1)."""
    return valid / (jnp.maximum(jnp.sum(counted), 1) * limit)


def without_overlong(valid: Array, truncated: Bool[Array, "B G"]) -> Bool[Array, "B G C"]:
    """`valid` without captions that reached the limit before a stop id (DAPO, 3.4)."""
    return valid & ~truncated[..., None]


RATIOS = {"token": token_log_ratio, "sequence": sequence_log_ratio}
KLS = {"k1": k1, "k2": k2, "k3": k3}
SHARES = {"sequence": sequence_shares, "token": token_shares, "constant": constant_shares}


def check_objective(config: ObjectiveConfig) -> None:
    """Validate the names and ranges of `objective`.

    Raises:
        InputError: a field is invalid.
    """
    named = {"advantage": ("std", "mean"), "ratio": RATIOS, "kl": KLS, "aggregate": SHARES}
    for field, names in named.items():
        if getattr(config, field) not in names:
            raise InputError(f"objective.{field}: {getattr(config, field)!r} is not one of {', '.join(names)}")
    if not 0 <= config.clip_low <= 1 or config.clip_high < 0:
        raise InputError("objective: clip_low must be from 0 to 1, clip_high at least 0")
    if min(config.beta, config.importance_cap) < 0 or config.std_floor <= 0:
        raise InputError("objective: beta and importance_cap must be at least 0, std_floor more than 0")


def advantages(rewards: Float[Array, "B G"], config: ObjectiveConfig) -> Float[Array, "B G"]:
    """Group-relative advantages by `config.advantage`."""
    return mean_advantage(rewards) if config.advantage == "mean" else std_advantage(rewards, config.std_floor)


class ObjectiveTotals(NamedTuple):
    """Sums over the valid tokens, so that parts of a batch can be added."""

    policy: Float[Array, ""]  # the clipped surrogate loss, weighted by shares
    kl: Float[Array, ""]  # k3 against the reference
    ratio: Float[Array, ""]
    clipped_low: Float[Array, ""]  # tokens clipped at 1 - low (negative advantage)
    clipped_high: Float[Array, ""]  # tokens clipped at 1 + high (positive advantage)
    moved: Float[Array, ""]  # k3 against the sampling policy
    tokens: Float[Array, ""]


def objective(
    new: Float[Array, "B G C"],
    old: Float[Array, "B G C"],
    sampled: Float[Array, "B G C"],
    reference: Float[Array, "B G C"],
    advantage: Float[Array, "B G"],
    valid: Bool[Array, "B G C"],
    shares: Float[Array, "B G C"],
    config: ObjectiveConfig,
) -> tuple[Float[Array, ""], ObjectiveTotals]:
    """The loss and its components.

    Args:
        new: log-probabilities of the sampled tokens under the policy; the only differentiated argument.
        old: log-probabilities under the policy before the updates of the batch, computed by the trainer.
        sampled: log-probabilities under the sampling policy, computed by the sampler.
        reference: log-probabilities under the reference.
        shares: the weight of each token; 0 where `valid` is False.
    """
    ratio = jnp.exp(RATIOS[config.ratio](new, old, valid))
    advantage = jnp.broadcast_to(advantage[..., None], new.shape)
    gain = clipped(ratio, advantage, config.clip_low, config.clip_high)
    d = jnp.where(valid, reference - new, 0)  # masked before the exponential, which could overflow
    kl, kl_k3 = KLS[config.kl](d), k3(d)
    if config.importance_cap:
        gain *= truncated_importance(old, sampled, valid, config.importance_cap)
        weight = truncated_importance(new, sampled, valid, config.importance_cap)
        kl, kl_k3 = kl * weight, kl_k3 * weight
    policy = -jnp.sum(gain * shares)
    kl_loss = jnp.sum(kl * shares)
    clipped_low = (ratio < 1 - config.clip_low) & (advantage < 0)
    clipped_high = (ratio > 1 + config.clip_high) & (advantage > 0)
    totals = ObjectiveTotals(
        policy=policy,
        kl=jnp.sum(kl_k3),
        ratio=jnp.sum(ratio, where=valid),
        clipped_low=jnp.sum(clipped_low & valid, dtype=jnp.float32),
        clipped_high=jnp.sum(clipped_high & valid, dtype=jnp.float32),
        moved=jnp.sum(k3(jnp.where(valid, old - new, 0))),
        tokens=jnp.sum(valid, dtype=jnp.float32),
    )
    return policy + config.beta * kl_loss, jax.lax.stop_gradient(totals)

"""From logits to a token: bans, temperature, top-k, top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from avocado_jax.typing import Array, Bool, Float, Int

NEVER = -1e30  # of a banned token: finite, so that no arithmetic makes NaN


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Static: a change compiles anew, so no old value lingers in a compiled step."""

    temperature: float = 1.0  # 0 takes the most probable token
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def __post_init__(self) -> None:
        fine = self.temperature == 0 or 1e-3 <= self.temperature < float("inf")
        if not fine or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need temperature 0 or at least 0.001, top-k >= 0 and 0 < top-p <= 1, got {self}")


GREEDY = Sampling(temperature=0.0)


def truncate(logits: Float[Array, "... V"], sampling: Sampling) -> Float[Array, "... V"]:
    """Keep the `top_k` largest logits, then the fewest of those whose probability reaches `top_p`.

    Ties with the last one kept are kept too.
    """
    if not sampling.top_k and sampling.top_p == 1:
        return logits
    ranked = jnp.sort(logits, axis=-1, descending=True)
    least = jnp.full(logits.shape[:-1], -jnp.inf, logits.dtype)
    if sampling.top_k:
        least = ranked[..., min(sampling.top_k, logits.shape[-1]) - 1]
        ranked = jnp.where(ranked >= least[..., None], ranked, -jnp.inf)
    if sampling.top_p < 1:
        probability = jax.nn.softmax(ranked, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        kept = jnp.sum(before < sampling.top_p, axis=-1, keepdims=True)
        least = jnp.maximum(least, jnp.take_along_axis(ranked, kept - 1, axis=-1)[..., 0])
    return jnp.where(logits >= least[..., None], logits, NEVER)


def draw(
    logits: Float[Array, "V"], banned: Bool[Array, "V"], key: jax.Array, sampling: Sampling
) -> tuple[Int[Array, ""], Float[Array, ""]]:
    """One token of one caption, and its log-probability under the policy at this temperature.

    The log-probability is taken before bans and truncation (at temperature 0, at temperature 1): it is what
    a trainer computes from the same logits, so that their difference measures numerics alone.
    """
    scaled = logits.astype(jnp.float32) / (sampling.temperature or 1.0)
    allowed = jnp.where(banned, NEVER, scaled)
    greedy = sampling.temperature == 0
    token = jnp.argmax(allowed) if greedy else jax.random.categorical(key, truncate(allowed, sampling))
    return token.astype(jnp.int32), scaled[token] - jax.nn.logsumexp(scaled)

"""Draw tokens from logits: banned ids, temperature, top-k, top-p."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from avocado_jax.typing import Array, Bool, Float, Int

NEVER = -1e30  # logit of a banned token; finite, so that arithmetic gives no NaN


@dataclass(frozen=True)
class Sampling:
    """Sampling settings. Static: a change recompiles the program."""

    temperature: float = 1.0  # 0: greedy
    top_k: int = 0  # 0: all
    top_p: float = 1.0

    def __post_init__(self) -> None:
        fine = self.temperature == 0 or 1e-3 <= self.temperature < float("inf")
        if not fine or self.top_k < 0 or not 0 < self.top_p <= 1:
            raise ValueError(f"need temperature 0 or at least 0.001, top-k >= 0 and 0 < top-p <= 1, got {self}")


GREEDY = Sampling(temperature=0.0)


def truncate(logits: Float[Array, "... V"], sampling: Sampling) -> Float[Array, "... V"]:
    """Keep the `top_k` largest logits, then the smallest set of these with a total probability of at least `top_p`.

    Ties with the smallest kept logit are also kept.
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
    """Draw one token of one caption; also return its log-probability under the policy at this temperature.

    The log-probability excludes bans and truncation, and uses temperature 1 for greedy decoding. The trainer computes
    the same value from the same logits, so that the difference measures only numerics.
    """
    scaled = logits.astype(jnp.float32) / (sampling.temperature or 1.0)
    allowed = jnp.where(banned, NEVER, scaled)
    greedy = sampling.temperature == 0
    token = jnp.argmax(allowed) if greedy else jax.random.categorical(key, truncate(allowed, sampling))
    return token.astype(jnp.int32), scaled[token] - jax.nn.logsumexp(scaled)

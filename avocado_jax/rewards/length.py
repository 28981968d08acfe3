"""R_L: the length reward."""

import jax.numpy as jnp

from avocado_jax.typing import Array, Float, Int


def length_reward(tokens: Int[Array, "..."], low: int = 2048, high: int = 4096) -> Float[Array, "..."]:
    """1 below `low` tokens, 1 - (tokens - low) / (high - low) up to `high`, 0 from there (paper, R_L)."""
    return jnp.clip((high - tokens) / (high - low), 0.0, 1.0)

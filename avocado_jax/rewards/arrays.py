"""Array operations on texts of static shape."""

import jax
import jax.numpy as jnp

from avocado_jax.typing import Array, Bool, Int


def compact(mask: Bool[Array, "n"], values: Array, size: int) -> tuple[Array, Int[Array, ""]]:
    """Move the masked values to the front, padded with 0; also return their number, which may exceed `size`."""
    count = jnp.cumsum(mask)
    at = jnp.where(mask, count - 1, size)
    return jnp.zeros(size, values.dtype).at[at].set(values, mode="drop"), count[-1]


def shift(values: Array, by: int, fill: int) -> Array:
    """Shift values by `by` positions (towards the start if negative); pad with `fill`."""
    edge = jnp.full(abs(by), fill, values.dtype)
    return jnp.concatenate([edge, values[:-by]]) if by > 0 else jnp.concatenate([values[-by:], edge])


def last_index(mask: Bool[Array, "n"]) -> Int[Array, "n"]:
    """For each index, the last index at or before it where the mask is true; -1 if none."""
    return jax.lax.cummax(jnp.where(mask, jnp.arange(len(mask), dtype=jnp.int32), -1))


def next_index(mask: Bool[Array, "n"]) -> Int[Array, "n"]:
    """For each index, the next index at or after it where the mask is true; n if none."""
    return jax.lax.cummin(jnp.where(mask, jnp.arange(len(mask), dtype=jnp.int32), len(mask)), reverse=True)


def count_before(mask: Bool[Array, "n"]) -> Int[Array, "m"]:
    """Count the true values before each index: n + 1 counts, the last over all values."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(mask, dtype=jnp.int32)])

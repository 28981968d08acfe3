"""Array operations on texts of static shape."""

import jax
import jax.numpy as jnp

from avocado_jax.typing import Array, Bool, Int


def compact(mask: Bool[Array, "n"], values: Array, size: int) -> tuple[Array, Int[Array, ""]]:
    """The values under a mask one after another, zeros behind them, and their number (which may exceed size)."""
    count = jnp.cumsum(mask)
    at = jnp.where(mask, count - 1, size)
    return jnp.zeros(size, values.dtype).at[at].set(values, mode="drop"), count[-1]


def shift(values: Array, by: int, fill: int) -> Array:
    """The value `by` places before each place (after it if negative); `fill` beyond the ends."""
    edge = jnp.full(abs(by), fill, values.dtype)
    return jnp.concatenate([edge, values[:-by]]) if by > 0 else jnp.concatenate([values[-by:], edge])


def last_place(mask: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The last place up to each place at which the mask holds; -1 where there is none."""
    return jax.lax.cummax(jnp.where(mask, jnp.arange(len(mask), dtype=jnp.int32), -1))


def next_place(mask: Bool[Array, "n"]) -> Int[Array, "n"]:
    """The next place from each place on at which the mask holds; n where there is none."""
    return jax.lax.cummin(jnp.where(mask, jnp.arange(len(mask), dtype=jnp.int32), len(mask)), reverse=True)


def count_before(mask: Bool[Array, "n"]) -> Int[Array, "m"]:
    """How many of the places before each place are under the mask: n + 1 counts, the last of all places."""
    return jnp.concatenate([jnp.zeros(1, jnp.int32), jnp.cumsum(mask, dtype=jnp.int32)])

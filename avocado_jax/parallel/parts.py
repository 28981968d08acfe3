"""A batch in parts, one after the other: less is alive at once.

Row r is in part r % parts, so that each device keeps its own rows, whatever the number of parts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from avocado_jax.typing import Array


def in_parts(batch: Any, parts: int) -> Any:
    """A tree of [rows, ...] as [parts, rows / parts, ...]."""
    return jax.tree.map(lambda leaf: jnp.moveaxis(leaf.reshape(-1, parts, *leaf.shape[1:]), 1, 0), batch)


def by_parts(run: Callable, batch: tuple, parts: int) -> Any:
    """`run(*batch)` where every leaf of `batch` and of what comes out is [rows, ...]."""
    if parts == 1:
        return run(*batch)

    def joined(leaf: Array) -> Array:
        return jnp.moveaxis(leaf, 0, 1).reshape(-1, *leaf.shape[2:])

    return jax.tree.map(joined, jax.lax.map(lambda part: run(*part), in_parts(batch, parts)))

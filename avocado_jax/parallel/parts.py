"""Microbatches: process a batch in sequential parts to reduce peak memory.

Row r belongs to part r % parts, so that each device keeps its rows for any number of parts.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from avocado_jax.typing import Array


def in_parts(batch: Any, parts: int) -> Any:
    """Reshape a tree of [rows, ...] to [parts, rows / parts, ...]."""

    def divide(leaf: Array) -> Array:  # without -1 in the shape: leaves may be empty (the sound of silent clips)
        return jnp.moveaxis(leaf.reshape(len(leaf) // parts, parts, *leaf.shape[1:]), 1, 0)

    return jax.tree.map(divide, batch)


def by_parts(run: Callable, batch: tuple, parts: int) -> Any:
    """Compute `run(*batch)` part by part.

    Args:
        run: function whose input and output leaves are all [rows, ...].
        batch: arguments of `run`.
        parts: number of sequential parts; must divide the rows.

    Returns:
        The result of `run(*batch)`, with rows in their original order.
    """
    if parts == 1:
        return run(*batch)

    def merge(leaf: Array) -> Array:
        return jnp.moveaxis(leaf, 0, 1).reshape(leaf.shape[0] * leaf.shape[1], *leaf.shape[2:])

    return jax.tree.map(merge, jax.lax.map(lambda part: run(*part), in_parts(batch, parts)))

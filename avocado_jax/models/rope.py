"""Rotary positions: TMRoPE for the language model, rows and columns for the picture, sinusoids for sound."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.typing import Array, Float, Int


class Rope(NamedTuple):
    """Cosine and sine of each position's angles; both halves of a head turn by the same angle."""

    cos: Float[Array, "... E"]
    sin: Float[Array, "... E"]


def _rope(angles: Array) -> Rope:
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def text_rope(positions: Int[Array, "... 3"], head: int, theta: float, sections: tuple[int, ...]) -> Rope:
    """TMRoPE (Qwen2.5-Omni, 2.1): frequency j turns with time, height or width, in contiguous sections.

    Angles, cosines and sines are fp32; the caller casts them to the dtype of the activations.
    """
    frequency = 1.0 / theta ** (np.arange(0, head, 2, dtype=np.float32) / head)
    axis = np.repeat(np.arange(3), sections)
    return _rope(positions[..., axis].astype(jnp.float32) * jax.lax.broadcast_to_rank(frequency, positions.ndim))


def patch_rope(grid: Int[Array, "... 2"], head: int, theta: float) -> Rope:
    """Rope of the vision tower: a quarter of the head turns with the row, a quarter with the column, twice."""
    half = head // 2
    frequency = 1.0 / theta ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = grid[..., None].astype(jnp.float32) * jax.lax.broadcast_to_rank(frequency, grid.ndim + 1)
    return _rope(angles.reshape(*grid.shape[:-1], half))


def rotate(x: Float[Array, "... H E"], rope: Rope) -> Float[Array, "... H E"]:
    """Turn every head of `x` by its position's angles, in the dtype of `x` or of the rope, the wider."""
    first, second = jnp.split(x, 2, axis=-1)
    turned = jnp.concatenate([-second, first], axis=-1)
    return x * rope.cos[..., None, :] + turned * rope.sin[..., None, :]


def sinusoids(length: int, width: int) -> Float[Array, "length width"]:
    """Whisper's fixed positions, [sines, cosines] halves, fp32."""
    scale = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * scale.astype(np.float32)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

"""Position embeddings: TMRoPE for the language model, 2D rope for the vision encoder, sinusoids for audio."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.typing import Array, Float, Int


class Rope(NamedTuple):
    """Cosine and sine of each position's angles. Both halves of a head use the same angles."""

    cos: Float[Array, "... E"]
    sin: Float[Array, "... E"]


def _rope(angles: Array) -> Rope:
    angles = jnp.concatenate([angles, angles], axis=-1)
    return Rope(jnp.cos(angles), jnp.sin(angles))


def text_rope(positions: Int[Array, "... 3"], head: int, theta: float, sections: tuple[int, ...]) -> Rope:
    """TMRoPE (Qwen2.5-Omni, 2.1): contiguous sections of frequencies use the time, height and width position.

    Angles, cosines and sines are fp32. The caller casts them to the activation dtype.
    """
    frequency = 1.0 / theta ** (np.arange(0, head, 2, dtype=np.float32) / head)
    axis = np.repeat(np.arange(3), sections)
    return _rope(positions[..., axis].astype(jnp.float32) * jax.lax.broadcast_to_rank(frequency, positions.ndim))


def patch_rope(grid: Int[Array, "... 2"], head: int, theta: float) -> Rope:
    """Rope of the vision encoder: in each half of the head, half of the dimensions use the row, half the column."""
    half = head // 2
    frequency = 1.0 / theta ** (np.arange(0, half, 2, dtype=np.float32) / half)
    angles = grid[..., None].astype(jnp.float32) * jax.lax.broadcast_to_rank(frequency, grid.ndim + 1)
    return _rope(angles.reshape(*grid.shape[:-1], half))


def rotate(x: Float[Array, "... H E"], rope: Rope) -> Float[Array, "... H E"]:
    """Rotate every head of `x` by its position's angles, in the promoted dtype of `x` and the rope."""
    first, second = jnp.split(x, 2, axis=-1)
    rotated = jnp.concatenate([-second, first], axis=-1)
    return x * rope.cos[..., None, :] + rotated * rope.sin[..., None, :]


def sinusoids(length: int, width: int) -> Float[Array, "length width"]:
    """Whisper's fixed position embeddings: [sines, cosines], fp32."""
    scale = np.exp(-np.log(10000.0) / (width // 2 - 1) * np.arange(width // 2, dtype=np.float32))
    angles = np.arange(length, dtype=np.float32)[:, None] * scale.astype(np.float32)
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)

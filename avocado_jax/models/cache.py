"""Keys and values kept between calls: they go in and come out, nothing is stored in a module."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.models.config import ThinkerConfig
from avocado_jax.typing import Array, Bool, Float, Int


class KV(NamedTuple):
    """Rotated keys, and values, by head: a decoding step reads each head's in one run."""

    k: Float[Array, "... K S E"]
    v: Float[Array, "... K S E"]

    def write(self, new: "KV", step: Int[Array, ""]) -> "KV":
        """The cache with the keys and values of one more token a caption, [B G K 1 E], at `step`."""
        return KV(*(jax.lax.dynamic_update_slice_in_dim(old, x, step, axis=3) for old, x in zip(self, new)))


class ClipCache(NamedTuple):
    """Every layer's keys and values of the clip, shared by its G captions.

    `layers` is one KV with a leading axis of layers where they are scanned, else a tuple of KV.
    """

    layers: Any
    valid: Bool[Array, "B P"]


def caption_cache(config: ThinkerConfig, rows: int, captions: int, length: int) -> Any:
    """Empty caches for `length` tokens of each of `captions` captions a row, in the layout of the layers."""
    text = config.text
    shape = (rows, captions, text.kv_heads, length, text.head)
    if config.scan:
        return KV(*(jnp.zeros((text.layers, *shape), config.dtype) for _ in range(2)))
    return tuple(KV(*(jnp.zeros(shape, config.dtype) for _ in range(2))) for _ in range(text.layers))

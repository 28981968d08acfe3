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


class Growing(NamedTuple):
    """A caption cache of rows that are at different steps, while they all decode some tokens.

    New tokens are written at one index of all rows: a write at an index of each row is a scatter, which costs more than
    the attention of a token.

    Attributes:
        old: the first `begun` tokens of each row; only read.
        new: the tokens since, up to `count`.
    """

    old: KV
    new: KV
    begun: Int[Array, "B"]
    count: Int[Array, ""]


class ClipCache(NamedTuple):
    """What decoding reads of a clip, shared by its G captions.

    Attributes:
        layers: keys and values: one KV with a leading axis of layers where they are scanned, else a tuple of KV.
        valid: the clip tokens that are attended to.
        start: the position of the first input of every caption.
    """

    layers: Any
    valid: Bool[Array, "B P"]
    start: Int[Array, "B"]


def caption_cache(config: ThinkerConfig, rows: int, captions: int, length: int) -> Any:
    """Empty caches for `length` tokens of each of `captions` captions a row, in the layout of the layers."""
    text = config.text
    shape = (rows, captions, text.kv_heads, length, text.head)
    if config.scan:
        return KV(*(jnp.zeros((text.layers, *shape), config.dtype) for _ in range(2)))
    return tuple(KV(*(jnp.zeros(shape, config.dtype) for _ in range(2))) for _ in range(text.layers))

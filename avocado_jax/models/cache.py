"""KV caches. They are passed in and out of calls; modules store no state."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.models.config import ThinkerConfig
from avocado_jax.typing import Array, Bool, Float, Int


class KV(NamedTuple):
    """Rotated keys, and values. The head axis is first, so that a decoding step reads each head contiguously."""

    k: Float[Array, "... K S E"]
    v: Float[Array, "... K S E"]

    def write(self, new: "KV", step: Int[Array, ""]) -> "KV":
        """Write the keys and values of one token per caption, [B G K 1 E], at `step`."""
        return KV(*(jax.lax.dynamic_update_slice_in_dim(old, x, step, axis=3) for old, x in zip(self, new)))


class Growing(NamedTuple):
    """A caption cache of rows at different steps, for decoding a few tokens of all rows.

    New tokens are written at the same index of all rows. Writing at a different index per row is a scatter, which costs
    more than the attention of a token.

    Attributes:
        old: the first `begun` tokens of each row; read only.
        new: the following `count` tokens of each row.
    """

    old: KV
    new: KV
    begun: Int[Array, "B"]
    count: Int[Array, ""]


class ClipCache(NamedTuple):
    """The KV cache of a clip, shared by its G captions.

    Attributes:
        layers: keys and values: one KV with a leading layer axis for scanned layers, else a tuple of KV.
        valid: mask of the clip tokens that captions attend to.
        start: the position of the first input of every caption.
    """

    layers: Any
    valid: Bool[Array, "B P"]
    start: Int[Array, "B"]


def caption_cache(config: ThinkerConfig, rows: int, captions: int, length: int) -> Any:
    """Allocate caches for `length` tokens of each of `captions` captions per row, in the layout of the layers."""
    text = config.text
    shape = (rows, captions, text.kv_heads, length, text.head)
    if config.scan:
        return KV(*(jnp.zeros((text.layers, *shape), config.dtype) for _ in range(2)))
    return tuple(KV(*(jnp.zeros(shape, config.dtype) for _ in range(2))) for _ in range(text.layers))

"""Losses over caption tokens, one vocabulary-wide block of logits at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.parallel.mesh import parts_of
from avocado_jax.typing import Array, Captions, Float

LOGITS_BYTES = 256 * 2**20  # fp32 logits alive at once on a device


class Sums(NamedTuple):
    """Over the caption tokens that count."""

    loss: Float[Array, ""]  # cross-entropy, nats
    correct: Float[Array, ""]  # tokens whose most likely prediction is right
    count: Float[Array, ""]


def counted(captions: Captions, weight: Float[Array, "B"]) -> Float[Array, "B G C"]:
    """1 where a target counts: it is valid, and its row has weight."""
    return captions.valid * weight[:, None, None]


def caption_sums(
    hidden: Float[Array, "B G C D"],
    logits: Callable[[Array], Array],
    captions: Captions,
    weight: Float[Array, "B"],
) -> Sums:
    """Next-token cross-entropy, summed. `logits` maps [... D] to fp32 [... V].

    Captions are taken in stretches along C, whose logits are recomputed in the backward pass and never kept.
    """
    rows, group, length, _ = hidden.shape
    vocab = jax.eval_shape(logits, hidden[:1, :1, :1]).shape[-1]
    local = max(1, rows // parts_of("rows"))
    stretch = min(length, max(1, LOGITS_BYTES // (4 * vocab * local * group)))
    stretches = -(-length // stretch)

    @jax.checkpoint
    def sums(hidden: Array, targets: Array, counts: Array) -> Sums:
        scores = logits(hidden)
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
        lse = jnp.log(jnp.sum(jnp.exp(scores - top[..., None]), axis=-1)) + top
        # A sum over the vocabulary, not a gather from it: it may be divided over devices.
        hit = jnp.arange(vocab) == targets[..., None]
        chosen = jnp.sum(jnp.where(hit, scores, 0), axis=-1)
        return Sums(
            jnp.sum((lse - chosen) * counts), jnp.sum((chosen >= top) * counts), jnp.sum(counts, dtype=jnp.float32)
        )

    counts = counted(captions, weight)
    if stretches == 1:
        return sums(hidden, captions.targets, counts)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, stretches * stretch - length), *((0, 0),) * (x.ndim - 3)))
        return jnp.moveaxis(x.reshape(rows, group, stretches, stretch, *x.shape[3:]), 2, 0)

    def add(total: Sums, part: tuple) -> tuple[Sums, None]:
        return jax.tree.map(jnp.add, total, sums(*part)), None

    zero = jax.tree.map(jnp.float32, Sums(0.0, 0.0, 0.0))
    return jax.lax.scan(add, zero, (cut(hidden), cut(captions.targets), cut(counts)))[0]

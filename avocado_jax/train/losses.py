"""Losses over caption tokens, one vocabulary-wide block of logits at a time."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.parallel.mesh import parts_of
from avocado_jax.typing import Array, Bool, Captions, Float, Int

LOGITS_BYTES = 256 * 2**20  # fp32 logits alive at once on a device


class Scores(NamedTuple):
    """What a model says of caption tokens."""

    logprob: Float[Array, "B G C"]  # of the token, nats
    entropy: Float[Array, "B G C"]  # of the distribution it was taken from; it has no gradient
    likeliest: Bool[Array, "B G C"]  # no other token is more probable


class Sums(NamedTuple):
    """Over the caption tokens that count."""

    loss: Float[Array, ""]  # cross-entropy, nats
    correct: Float[Array, ""]  # tokens whose most likely prediction is right
    count: Float[Array, ""]


def counted(captions: Captions, weight: Float[Array, "B"]) -> Float[Array, "B G C"]:
    """1 where a target counts: it is valid, and its row has weight."""
    return captions.valid * weight[:, None, None]


def caption_scores(
    hidden: Float[Array, "B G C D"],
    logits: Callable[[Array], Array],
    targets: Int[Array, "B G C"],
    temperature: float = 1.0,
) -> Scores:
    """Scores of the targets where logits are divided by `temperature`. `logits` maps [... D] to fp32 [... V].

    Captions are taken in stretches along C, whose logits are recomputed in the backward pass and never kept.
    """
    rows, group, length, _ = hidden.shape
    vocab = jax.eval_shape(logits, hidden[:1, :1, :1]).shape[-1]
    local = max(1, rows // parts_of("rows"))
    stretch = min(length, max(1, LOGITS_BYTES // (4 * vocab * local * group)))
    stretches = -(-length // stretch)

    @jax.checkpoint
    def scores_of(hidden: Array, targets: Array) -> Scores:
        scores = logits(hidden) / temperature
        top = jax.lax.stop_gradient(jnp.max(scores, axis=-1))
        weights = jnp.exp(scores - top[..., None])
        total = jnp.sum(weights, axis=-1)
        lse = jnp.log(total) + top
        # A sum over the vocabulary, not a gather from it: it may be divided over devices.
        hit = jnp.arange(vocab) == targets[..., None]
        chosen = jnp.sum(jnp.where(hit, scores, 0), axis=-1)
        mean = jnp.sum(jax.lax.stop_gradient(weights * scores), axis=-1) / jax.lax.stop_gradient(total)
        return Scores(chosen - lse, jax.lax.stop_gradient(lse) - mean, chosen >= top)

    if stretches == 1:
        return scores_of(hidden, targets)

    def cut(x: Array) -> Array:
        x = jnp.pad(x, ((0, 0), (0, 0), (0, stretches * stretch - length), *((0, 0),) * (x.ndim - 3)))
        return jnp.moveaxis(x.reshape(rows, group, stretches, stretch, *x.shape[3:]), 2, 0)

    def joined(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 2).reshape(rows, group, -1)[..., :length]

    return jax.tree.map(joined, jax.lax.map(lambda part: scores_of(*part), (cut(hidden), cut(targets))))


def caption_sums(
    hidden: Float[Array, "B G C D"],
    logits: Callable[[Array], Array],
    captions: Captions,
    weight: Float[Array, "B"],
) -> Sums:
    """Next-token cross-entropy, summed; see `caption_scores`."""
    scores, counts = caption_scores(hidden, logits, captions.targets), counted(captions, weight)
    return Sums(
        -jnp.sum(scores.logprob * counts), jnp.sum(scores.likeliest * counts), jnp.sum(counts, dtype=jnp.float32)
    )

"""Plain attention in mergeable parts: every part returns its output and its log-sum-exp.

A caption attends to its clip and to itself. The two softmaxes are computed separately and merged, so that the clip's
keys are read once for all G captions and never broadcast.
"""

import math
from functools import reduce

import jax
import jax.numpy as jnp

from avocado_jax.models.cache import KV
from avocado_jax.parallel.mesh import parts_of
from avocado_jax.typing import Array, Bool, Float

SCORE_BYTES = 256 * 2**20  # maximum bytes of fp32 scores on a device; more queries are processed in chunks
MASKED = -1e30  # score of masked keys; finite, so that a query without a valid key gives no NaN


def attend(
    q: Float[Array, "B Q H E"],
    k: Float[Array, "B K S E"],
    v: Float[Array, "B K S E"],
    valid: Bool[Array, "B S"] | None = None,
    causal: bool = False,
) -> tuple[Float[Array, "B Q H E"], Float[Array, "B Q H"]]:
    """softmax(q k' / sqrt(E)) v over the valid keys, and the fp32 log-sum-exp of the scores.

    Args:
        q, k, v: queries of H heads, keys and values of K heads. H is a multiple of K, and query head h uses key head
            h // (H / K). The head axis of keys precedes the sequence axis, as in the caches.
        valid: mask of keys; None: all. The output of a query without valid keys is finite but undefined, with a
            log-sum-exp of about -1e30, so that its weight in `merge` is 0.
        causal: query i attends to keys up to i.

    The softmax is computed in fp32; its weights are cast to the dtype of `v`, as in the reference.
    """
    batch, queries, heads, width = q.shape
    kv_heads, keys = k.shape[1:3]
    q = q.reshape(batch, queries, kv_heads, heads // kv_heads, width)

    def block(q: Array, first: Array | int) -> tuple[Array, Array]:
        scores = jnp.einsum("BQKRE,BKSE->BQKRS", q, k, preferred_element_type=jnp.float32) / math.sqrt(width)
        if valid is not None:
            scores = jnp.where(valid[:, None, None, None], scores, MASKED)
        if causal:
            visible = jnp.arange(keys)[None] <= (first + jnp.arange(q.shape[1]))[:, None]
            scores = jnp.where(visible[:, None, None], scores, MASKED)
        lse = jax.nn.logsumexp(scores, axis=-1)
        weights = jnp.exp(scores - lse[..., None]).astype(v.dtype)
        return jnp.einsum("BQKRS,BKSE->BQKRE", weights, v), lse

    chunk = max(16, SCORE_BYTES * parts_of("rows") * parts_of("tensor") // (4 * max(1, batch * heads * keys)))
    if queries <= chunk:
        out, lse = block(q, 0)
    else:
        chunks = -(-queries // chunk)
        padded = jnp.pad(q, ((0, 0), (0, chunks * chunk - queries), (0, 0), (0, 0), (0, 0)))
        blocks = jnp.moveaxis(padded.reshape(batch, chunks, chunk, *q.shape[2:]), 1, 0)
        out, lse = jax.lax.map(
            lambda item: jax.checkpoint(block)(*item), (blocks, jnp.arange(chunks) * chunk)
        )  # the scores of each chunk are recomputed in the backward pass
        out, lse = (
            jnp.moveaxis(part, 0, 1).reshape(batch, chunks * chunk, *part.shape[3:])[:, :queries] for part in (out, lse)
        )
    return out.reshape(batch, queries, heads, width), lse.reshape(batch, queries, heads)


def attend_clip(q: Float[Array, "B P H E"], kv: KV) -> Float[Array, "B P H E"]:
    """Causal attention of clip tokens, with padding at the end. `kv` is [B K P E]."""
    return attend(q, *kv, causal=True)[0]


def attend_captions(
    q: Float[Array, "B G Q H E"],
    captions: KV,
    clip: KV,
    clip_valid: Bool[Array, "B P"],
) -> Float[Array, "B G Q H E"]:
    """Captions attend to their clip's valid tokens, [B K P E], and causally to `captions`, [B G K S E]."""
    rows, group, queries = q.shape[:3]
    itself, itself_lse = attend(*(part.reshape(rows * group, *part.shape[2:]) for part in (q, *captions)), causal=True)
    # The captions of a row form one sequence of queries, so that the clip's keys are read once.
    listed, lse = attend(q.reshape(rows, group * queries, *q.shape[3:]), *clip, clip_valid)
    parts = [(itself, itself_lse), (listed, lse)]
    return merge([(out.reshape(q.shape), lse.reshape(q.shape[:-1])) for out, lse in parts])


def attend_step(
    q: Float[Array, "B G H E"],
    captions: list[tuple[KV, Bool[Array, "#B _"]]],
    clip: KV,
    clip_valid: Bool[Array, "B P"],
) -> Float[Array, "B G H E"]:
    """One decoding step: the new token of each caption attends to its clip, [B K P E], and its caption.

    Computes one softmax over all parts without concatenating them. The clip's keys are read once for all captions.

    Args:
        captions: parts of the caption cache, [B G K S E], each with a mask of its positions, shared by all captions of
            a row.
        clip_valid: mask of the clip tokens.
    """
    kv_heads, width = clip.k.shape[1], q.shape[-1]
    heads = q.reshape(*q.shape[:2], kv_heads, -1, width)
    scores = [jnp.einsum("BGKRE,BKPE->BGKRP", heads, clip.k, preferred_element_type=jnp.float32)]
    scores += [jnp.einsum("BGKRE,BGKSE->BGKRS", heads, kv.k, preferred_element_type=jnp.float32) for kv, _ in captions]
    masks = [clip_valid, *(mask for _, mask in captions)]
    scores = [
        jnp.where(mask[:, None, None, None], part / math.sqrt(width), MASKED)
        for mask, part in zip(masks, scores, strict=True)
    ]
    largest = reduce(jnp.maximum, (jnp.max(part, axis=-1, keepdims=True) for part in scores))
    weights = [jnp.exp(part - largest) for part in scores]
    total = sum(jnp.sum(part, axis=-1, keepdims=True) for part in weights)
    clip_weights, *caption_weights = (part.astype(q.dtype) for part in weights)
    mixed = jnp.einsum("BGKRP,BKPE->BGKRE", clip_weights, clip.v, preferred_element_type=jnp.float32)
    for part, (kv, _) in zip(caption_weights, captions):
        mixed = mixed + jnp.einsum("BGKRS,BGKSE->BGKRE", part, kv.v, preferred_element_type=jnp.float32)
    return (mixed / total).astype(q.dtype).reshape(q.shape)


def attend_block(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S H E"],
    v: Float[Array, "B S H E"],
    valid: Bool[Array, "B S"],
) -> Float[Array, "B S H E"]:
    """Bidirectional attention over the valid tokens of a block, for the encoders."""
    return attend(q, k.swapaxes(1, 2), v.swapaxes(1, 2), valid)[0]


def merge(
    parts: list[tuple[Float[Array, "... H E"], Float[Array, "... H"]]],
) -> Float[Array, "... H E"]:
    """Merge the parts of a softmax: sum_i exp(lse_i - lse) out_i with lse = log sum_i exp(lse_i)."""
    if len(parts) == 1:
        return parts[0][0]
    total = jax.nn.logsumexp(jnp.stack([lse for _, lse in parts]), axis=0)
    mixed = sum(out.astype(jnp.float32) * jnp.exp(lse - total)[..., None] for out, lse in parts)
    return mixed.astype(parts[0][0].dtype)

"""Losses over caption tokens. Logits are computed for one chunk of tokens at a time.

The computation runs in one `shard_map` over the context mesh: rows are sharded over (data, fsdp), the vocabulary over
`tensor`. The output matrix is gathered over `fsdp` once, in the compute dtype, and kept for the backward pass. Its
gradient is accumulated over the chunks in fp32 and reduce-scattered once, for one piece of the vocabulary at a time, so
that a device never has the full gradient.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from avocado_jax.parallel.mesh import ROWS, parts_of
from avocado_jax.typing import Array, Bool, Captions, Float, Int

LOGITS_BYTES = 256 * 2**20  # fp32 logits of one chunk on a device
PIECES = 8  # pieces of the vocabulary for computing and reducing the gradient of the output matrix


class Scores(NamedTuple):
    """Scores of caption tokens under a model."""

    logprob: Float[Array, "B G C"]  # log-probability of the token, nats
    entropy: Float[Array, "B G C"]  # entropy of the token's distribution; not differentiable
    likeliest: Bool[Array, "B G C"]  # whether no other token is more probable


class LossTotals(NamedTuple):
    """Sums over the counted caption tokens."""

    loss: Float[Array, ""]  # cross-entropy, nats
    correct: Float[Array, ""]  # number of tokens predicted correctly
    count: Float[Array, ""]  # number of tokens


def counted(captions: Captions, weight: Float[Array, "B"]) -> Float[Array, "B G C"]:
    """The loss mask: 1 for valid targets in rows with weight."""
    return captions.valid * weight[:, None, None]


def loss_totals(
    hidden: Float[Array, "B G C D"],
    head: Float[Array, "V D"],
    captions: Captions,
    weight: Float[Array, "B"],
) -> LossTotals:
    """Summed next-token cross-entropy; see `caption_scores`."""
    scores, counts = caption_scores(hidden, head, captions.targets), counted(captions, weight)
    return LossTotals(
        -jnp.sum(scores.logprob * counts), jnp.sum(scores.likeliest * counts), jnp.sum(counts, dtype=jnp.float32)
    )


def caption_scores(
    hidden: Float[Array, "B G C D"],
    head: Float[Array, "V D"],
    targets: Int[Array, "B G C"],
    temperature: float = 1.0,
) -> Scores:
    """Compute scores of the targets under softmax(hidden @ head.T / temperature).

    Args:
        hidden: hidden states in the compute dtype. `head` is cast to it; logits are fp32.

    Returns:
        fp32 scores. `logprob` is differentiable with respect to `hidden` and `head`.
    """
    pad = -len(hidden) % parts_of("rows")  # shard_map divides rows evenly; padded rows have no gradient
    rows = (jnp.pad(part, ((0, pad), *((0, 0),) * (part.ndim - 1))) for part in (hidden, targets))
    scores = _scores(*rows, head, temperature)
    return jax.tree.map(lambda part: part[: len(hidden)], scores) if pad else scores


class _Axes(NamedTuple):
    """Mesh axes that shard each dimension; () without a mesh, or if the size is not divisible."""

    rows: tuple[str, ...]
    vocabulary: tuple[str, ...]
    width: tuple[str, ...]

    @property
    def by_rows(self) -> PartitionSpec:
        return PartitionSpec(self.rows or None)

    @property
    def stored(self) -> PartitionSpec:
        """Sharding of the output matrix and its gradient, as in `parallel.rules`."""
        return PartitionSpec(self.vocabulary or None, self.width or None)

    @property
    def gathered(self) -> PartitionSpec:
        """Sharding of the gathered output matrix."""
        return PartitionSpec(self.vocabulary or None)


def _axes(head: Array) -> _Axes:
    def divides(axis: str, size: int) -> tuple[str, ...]:
        return (axis,) if parts_of(axis) > 1 and size % parts_of(axis) == 0 else ()

    rows = tuple(axis for axis in ROWS if parts_of(axis) > 1)
    return _Axes(rows, divides("tensor", head.shape[0]), divides("fsdp", head.shape[1]))


def _sharded(run: Callable, axes: _Axes, in_specs: Any, out_specs: Any) -> Callable:
    """Apply `shard_map` to `run`, unless no axis is sharded."""
    if not any(axes):
        return run
    return jax.shard_map(run, in_specs=in_specs, out_specs=out_specs, check_vma=False)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(hidden: Array, targets: Array, head: Array, temperature: float) -> Scores:
    return _forward(hidden, targets, head, temperature)[0]


def _forward(hidden: Array, targets: Array, head: Array, temperature: float) -> tuple[Scores, tuple]:
    axes = _axes(head)

    def run(hidden: Array, targets: Array, head: Array) -> tuple[Scores, Array, Array]:
        matrix = head.astype(hidden.dtype)
        if axes.width:
            matrix = jax.lax.all_gather(matrix, axes.width, axis=1, tiled=True)

        def chunk(hidden: Array, targets: Array) -> tuple[Scores, Array]:
            scores, hit = _logits(hidden, targets, matrix, temperature, axes)
            top = jax.lax.pmax(jnp.max(scores, axis=-1), axes.vocabulary)
            weights = jnp.exp(scores - top[:, None])
            # A sum, not a gather: the target may be in another device's part of the vocabulary.
            partials = (jnp.sum(part, axis=-1) for part in (weights, weights * scores, jnp.where(hit, scores, 0)))
            total, weighted, chosen = jax.lax.psum(tuple(partials), axes.vocabulary)
            lse = jnp.log(total) + top
            return Scores(chosen - lse, lse - weighted / total, chosen >= top), lse

        scores, lse = _in_chunks(chunk, (hidden, targets), matrix)
        return scores, lse, matrix

    outputs = (Scores(*(axes.by_rows,) * 3), axes.by_rows, axes.gathered)
    run = _sharded(run, axes, (axes.by_rows, axes.by_rows, axes.stored), outputs)
    scores, lse, matrix = run(hidden, targets, head)
    return scores, (hidden, targets, lse, matrix, head)


def _backward(temperature: float, kept: tuple, gradient: Scores) -> tuple[Array, None, Array]:
    hidden, targets, lse, matrix, head = kept
    axes = _axes(head)

    def run(hidden: Array, targets: Array, lse: Array, gradient: Array, matrix: Array) -> tuple[Array, Array]:
        fp32 = dict(preferred_element_type=jnp.float32)
        pieces = matrix.reshape(math.gcd(len(matrix), PIECES), -1, matrix.shape[1])
        parts, merged = _chunks((hidden, targets, lse, gradient), pieces[0])

        def piece(to_hidden: Array, numbered: tuple) -> tuple[Array, Array]:
            number, matrix = numbered

            def chunk(total: Array, part: tuple) -> tuple[Array, Array]:
                hidden, targets, lse, gradient = part
                scores, hit = _logits(hidden, targets, matrix, temperature, axes, number, len(pieces))
                slope = (hit - jnp.exp(scores - lse[:, None])) * (gradient / temperature)[:, None]
                slope = slope.astype(hidden.dtype)
                to_hidden = jnp.einsum("NV,VD->ND", slope, matrix, **fp32)
                return total + jnp.einsum("ND,NV->DV", hidden, slope, **fp32), to_hidden

            to_head, more = jax.lax.scan(chunk, jnp.zeros(matrix.shape[::-1], jnp.float32), parts)
            return to_hidden + more, _reduced(to_head, axes)

        start = jnp.zeros(parts[0].shape, jnp.float32)
        to_hidden, to_head = jax.lax.scan(piece, start, (jnp.arange(len(pieces)), pieces))
        to_hidden = jax.lax.psum(to_hidden, axes.vocabulary).astype(hidden.dtype)
        return merged(to_hidden), to_head.reshape(len(matrix), -1)

    by_rows = axes.by_rows
    run = _sharded(run, axes, (by_rows, by_rows, by_rows, by_rows, axes.gathered), (by_rows, axes.stored))
    to_hidden, to_head = run(hidden, targets, lse, gradient.logprob, matrix)
    return to_hidden, None, to_head.astype(head.dtype)


_scores.defvjp(_forward, _backward)


def _reduced(total: Array, axes: _Axes) -> Array:
    """Sum a piece of the output matrix's gradient [D V] over all rows; the result has sharding `axes.stored` [V D].

    TPU compilers reduce-scatter only along the leading axis. Along other axes, and over a whole slice, they compute an
    all-reduce of full size. Hence the leading axis, and one piece of the vocabulary at a time.
    """
    rest = tuple(axis for axis in axes.rows if axis not in axes.width)
    if axes.width:
        total = jax.lax.psum_scatter(total, axes.width, scatter_dimension=0, tiled=True)
    return jax.lax.psum(total, rest).T


def _logits(
    hidden: Array,
    targets: Array,
    matrix: Array,
    temperature: float,
    axes: _Axes,
    number: Array | int = 0,
    pieces: int = 1,
) -> tuple[Array, Array]:
    """The fp32 logits [N V] of piece `number` of `pieces` of this device's vocabulary, and the mask of targets."""
    logits = jnp.einsum("ND,VD->NV", hidden, matrix, preferred_element_type=jnp.float32) / temperature
    first = jax.lax.axis_index(axes.vocabulary) * pieces + number if axes.vocabulary else number
    return logits, first * len(matrix) + jnp.arange(len(matrix))[None] == targets[:, None]


def _chunks(tokens: tuple, matrix: Array) -> tuple[tuple, Callable]:
    """Reshape arrays [B G C ...] to [chunks, N, ...], padded with zeros; also return the inverse function.

    The logits of N tokens for this device's part of the vocabulary have LOGITS_BYTES bytes.
    """
    shape = tokens[0].shape[:3]
    count = math.prod(shape)
    size = min(count, max(1, LOGITS_BYTES // (4 * len(matrix))))
    pad = -count % size

    def chunked(part: Array) -> Array:
        flat = part.reshape(count, *part.shape[3:])
        return jnp.pad(flat, ((0, pad), *((0, 0),) * (flat.ndim - 1))).reshape(-1, size, *flat.shape[1:])

    def merged(part: Array) -> Array:
        return part.reshape(count + pad, *part.shape[2:])[:count].reshape(*shape, *part.shape[2:])

    return tuple(map(chunked, tokens)), merged


def _in_chunks(run: Callable, tokens: tuple, matrix: Array) -> Any:
    """Apply `run` to chunks of tokens; the results have shape [B G C ...]."""
    parts, merged = _chunks(tokens, matrix)
    return jax.tree.map(merged, jax.lax.map(lambda part: run(*part), parts))

"""Fused attention of TPU: scores never leave the chip's own memory.

A row's captions are one list of queries over [captions; clip], with a mask that skips other captions' blocks: the
clip's keys are shared by all. The kernel's log-sum-exp cannot be differentiated, so this is one call, not two that are
merged. Lengths are padded to the kernel's blocks, and outputs cut to their length. Rows are sharded over the mesh's
rows, heads over `tensor`.

Block sizes are fields of the config (`splash`). A compiler without a chip can only refuse what exceeds the vector
memory. Compiled alone, for 28,032 clip tokens and captions of 4,096, forward and backward, 1,024 queries by 1,024 keys
fit v5e, v5p and v6e, and 2,048 fit v6e only. In the step of `sft_7b` on v5p, 1,024 in the backward pass exceed the
kernel's 16 MiB by 1.1 MiB, so the default is 512. On v6e a larger `splash.q` is worth measuring: a block of q queries
computes q operations per byte of keys and values, and 512 is below the chip's ratio of 560.
"""

import math
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as splash
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
from jax.sharding import PartitionSpec

from avocado_jax.errors import InputError
from avocado_jax.models.cache import KV
from avocado_jax.models.config import SplashBlocks
from avocado_jax.parallel.mesh import ROWS, parts_of
from avocado_jax.typing import Array, Bool, Float

LANES = 128  # of the vector unit: blocks are multiples
VISIBLE, HIDDEN = 0, 1  # segment ids: queries attend to keys of the same id


DEFAULT = SplashBlocks()


def attend_clip(
    q: Float[Array, "B P H E"], kv: KV, interpret: bool = False, blocks: SplashBlocks = DEFAULT
) -> Float[Array, "B P H E"]:
    """Causal attention of a clip's tokens; `kv` is [B K P E].

    Only padding attends to padding at the end, so it needs no mask.
    """
    return _splash("causal", q, kv, None, interpret, blocks)


def attend_captions(
    q: Float[Array, "B G C H E"],
    captions: KV,
    clip: KV,
    clip_valid: Bool[Array, "B P"],
    interpret: bool = False,
    blocks: SplashBlocks = DEFAULT,
) -> Float[Array, "B G C H E"]:
    """Captions attend to the clip's valid tokens and, causally, to `captions`, [B G K C E]."""
    rows, group, length, *heads = q.shape
    listed = (part.swapaxes(1, 2).reshape(rows, -1, group * length, heads[1]) for part in captions)
    keys = KV(*(jnp.concatenate(both, axis=2) for both in zip(listed, clip)))
    valid = jnp.pad(clip_valid, ((0, 0), (group * length, 0)), constant_values=True)
    flat = q.reshape(rows, -1, *heads)
    return _splash(f"captions {group} {length}", flat, keys, valid, interpret, blocks).reshape(q.shape)


def attend_block(
    q: Float[Array, "B S H E"],
    k: Float[Array, "B S H E"],
    v: Float[Array, "B S H E"],
    valid: Bool[Array, "B S"],
    interpret: bool = False,
    blocks: SplashBlocks = DEFAULT,
) -> Float[Array, "B S H E"]:
    """All valid tokens of a block see each other. A block without any gives finite, meaningless output."""
    return _splash("full", q, KV(k.swapaxes(1, 2), v.swapaxes(1, 2)), valid, interpret, blocks)


def _splash(kind: str, q: Array, kv: KV, valid: Array | None, interpret: bool, blocks: SplashBlocks) -> Array:
    """One call of the kernel a row and a key head, in parts over the mesh: rows over its rows, heads over `tensor`."""
    rows, queries, heads, width = q.shape
    kv_heads, keys = kv.k.shape[1:3]
    over, tensor = parts_of("rows"), parts_of("tensor")
    if heads % tensor or (tensor % kv_heads and kv_heads % tensor):
        raise InputError(f"mesh.tensor {tensor} does not divide {heads} query heads and {kv_heads} key heads evenly")
    if tensor > kv_heads:  # each chip holds a copy of the one key head that its queries read
        kv = KV(*(jnp.repeat(part, tensor // kv_heads, axis=1) for part in kv))

    q = jnp.einsum("BQHE->BHQE", q) * jnp.asarray(1 / math.sqrt(width), q.dtype)
    block_q, block_kv = _block(queries, blocks.q), _block(keys, blocks.kv)
    q = _padded(q, 2, block_q)
    kv = KV(*(_padded(part, 2, block_kv) for part in kv))
    segments = None
    if valid is not None:
        hidden = jnp.where(_padded(valid, 1, block_kv), VISIBLE, HIDDEN).astype(jnp.int32)
        segments = splash.SegmentIds(jnp.full((rows, q.shape[2]), VISIBLE, jnp.int32), hidden)
    backward = _divisor(q.shape[2], blocks.q_backward), _divisor(kv.k.shape[2], blocks.kv_backward)
    kernel = _kernel(
        kind, q.shape[2], kv.k.shape[2], SplashBlocks(block_q, block_kv, *backward), heads // tensor, interpret
    )

    def run(q: Array, k: Array, v: Array, segments: Any) -> Array:
        return jax.vmap(kernel)(q, k, v, segments)

    if over * tensor > 1:
        by_row = ROWS if rows % over == 0 else None  # a batch too small to be divided is computed everywhere
        spec, whole = PartitionSpec(by_row, "tensor"), PartitionSpec(by_row)
        specs = (spec, spec, spec, segments and splash.SegmentIds(whole, whole))
        # The kernel does not say how its output varies over the mesh.
        run = jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)
    return jnp.einsum("BHQE->BQHE", run(q, *kv, segments)[:, :, :queries])


def _block(length: int, most: int) -> int:
    """The block size of at most `most` that covers `length` with the fewest steps and little padding."""
    steps = -(-length // most)
    return -(-length // (steps * LANES)) * LANES


def _divisor(length: int, most: int) -> int:
    """The largest block size of at most `most` that divides `length`, a multiple of LANES."""
    return max(size for size in range(LANES, max(most, LANES) + 1, LANES) if length % size == 0)


def _padded(x: Array, axis: int, unit: int) -> Array:
    """`x` with zeros (no tokens) up to a multiple of `unit` along an axis."""
    return jnp.pad(x, [(0, -x.shape[i] % unit if i == axis else 0) for i in range(x.ndim)])


class _CaptionMask(masks.Mask):
    """Queries [G captions of C tokens], keys [the same captions; clip]: see the module's docstring."""

    def __init__(self, shape: tuple[int, int], group: int, length: int) -> None:
        self.sizes = (*shape, group, length)

    @property
    def shape(self) -> tuple[int, int]:
        return self.sizes[:2]

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        _, _, group, length = self.sizes
        query, key = (np.arange(size)[part] for size, part in zip(self.shape, index))
        query, key = query[:, None], key[None]
        itself = (query // length == key // length) & (query >= key)
        return (key >= group * length) | itself

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _CaptionMask) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)


@lru_cache(maxsize=64)
def _kernel(kind: str, queries: int, keys: int, blocks: SplashBlocks, heads: int, interpret: bool) -> Callable:
    """The compiled-in form of one mask; making it costs seconds at full length, and layers share it."""
    name, *sizes = kind.split()
    mask: masks.Mask = {
        "causal": lambda: masks.CausalMask((queries, keys)),
        "captions": lambda: _CaptionMask((queries, keys), *map(int, sizes)),
        "full": lambda: masks.FullMask((queries, keys)),
    }[name]()
    sizes = splash.BlockSizes(
        block_q=blocks.q,
        block_kv=blocks.kv,
        block_q_dkv=blocks.q_backward,
        block_kv_dkv=blocks.kv_backward,
        block_q_dq=blocks.q_backward,
        block_kv_dq=blocks.kv_backward,
    )
    heads_mask = masks.MultiHeadMask([mask] * heads)
    make = partial(splash.make_splash_mha, block_sizes=sizes, head_shards=1, q_seq_shards=1, interpret=interpret)
    # It computes with jax at once: in a separate thread neither a trace nor a mesh is in use.
    with ThreadPoolExecutor(1) as executor:
        kernel = executor.submit(make, heads_mask).result()
    return jax.tree.map(np.asarray, kernel)  # constants of whatever program they are used in

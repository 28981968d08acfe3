"""Fused attention on TPU: scores stay in on-chip memory.

The captions of a row form one sequence of queries over [captions; clip], with a mask that skips the blocks of other
captions. All captions share the clip's keys. The kernel's log-sum-exp is not differentiable, so a single call is used
instead of two merged ones. Lengths are padded to the kernel's blocks, and outputs are truncated. Rows are sharded over
the mesh's row axes, heads over `tensor`.

Block sizes are fields of the config (`splash`). A compiler without a chip only rejects blocks that exceed the vector
memory. Compiled separately, for 28,032 clip tokens and captions of 4,096, forward and backward, 1,024 queries by 1,024
keys fit v5e, v5p and v6e, and 2,048 fit only v6e. In the step of `sft_7b` on v5p, 1,024 in the backward pass exceed the
kernel's 16 MiB by 1.1 MiB, so the default is 512. On v6e a larger `splash.q` should be measured: a block of q queries
computes q FLOPs per byte of keys and values, and 512 is below the chip's ratio of 560.
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

LANES = 128  # lanes of the vector unit; block sizes are multiples
VISIBLE, HIDDEN = 0, 1  # segment ids: queries attend to keys of the same id


DEFAULT = SplashBlocks()


def attend_clip(
    q: Float[Array, "B P H E"], kv: KV, interpret: bool = False, blocks: SplashBlocks = DEFAULT
) -> Float[Array, "B P H E"]:
    """Causal attention of clip tokens; `kv` is [B K P E].

    Padding is at the end, so only padding attends to padding and no mask is needed.
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
    keys = KV(*(jnp.concatenate(pair, axis=2) for pair in zip(listed, clip)))
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
    """Bidirectional attention over the valid tokens of a block. Without any, the output is finite but undefined."""
    return _splash("full", q, KV(k.swapaxes(1, 2), v.swapaxes(1, 2)), valid, interpret, blocks)


def _splash(kind: str, q: Array, kv: KV, valid: Array | None, interpret: bool, blocks: SplashBlocks) -> Array:
    """Call the kernel for each row and key head, sharded over the mesh: rows over its row axes, heads over `tensor`."""
    rows, queries, heads, width = q.shape
    kv_heads, keys = kv.k.shape[1:3]
    over, tensor = parts_of("rows"), parts_of("tensor")
    if heads % tensor or (tensor % kv_heads and kv_heads % tensor):
        raise InputError(f"mesh.tensor {tensor} does not divide {heads} query heads and {kv_heads} key heads evenly")
    if tensor > kv_heads:  # replicate each key head to the chips whose queries use it
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
        by_row = ROWS if rows % over == 0 else None  # a batch that is not divisible is replicated
        spec, segment_spec = PartitionSpec(by_row, "tensor"), PartitionSpec(by_row)
        specs = (spec, spec, spec, segments and splash.SegmentIds(segment_spec, segment_spec))
        # The kernel has no information on how its output varies over the mesh.
        run = jax.shard_map(run, in_specs=specs, out_specs=spec, check_vma=False)
    return jnp.einsum("BHQE->BQHE", run(q, *kv, segments)[:, :, :queries])


def _block(length: int, most: int) -> int:
    """The block size up to `most` that covers `length` with the fewest steps and little padding."""
    steps = -(-length // most)
    return -(-length // (steps * LANES)) * LANES


def _divisor(length: int, most: int) -> int:
    """The largest block size up to `most` that divides `length`, a multiple of LANES."""
    return max(size for size in range(LANES, max(most, LANES) + 1, LANES) if length % size == 0)


def _padded(x: Array, axis: int, unit: int) -> Array:
    """Pad `x` with zeros (masked tokens) to a multiple of `unit` along an axis."""
    return jnp.pad(x, [(0, -x.shape[i] % unit if i == axis else 0) for i in range(x.ndim)])


class _CaptionMask(masks.Mask):
    """Mask of queries [G captions of C tokens] over keys [the same captions; clip]; see the module's docstring."""

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
    """Build the kernel of a mask. This takes seconds at full length; layers share the result."""
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
    # The construction runs jax computations: a separate thread has no active trace or mesh.
    with ThreadPoolExecutor(1) as executor:
        kernel = executor.submit(make, heads_mask).result()
    return jax.tree.map(np.asarray, kernel)  # become constants of the programs that use them

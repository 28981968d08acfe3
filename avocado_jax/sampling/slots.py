"""The programs of the captioning engine: allocate slots, prefill clips into slots, decode all slots."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.models.cache import ClipCache, Growing, caption_cache
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import Encoded, Thinker
from avocado_jax.parallel.mesh import ROWS, traced_on_mesh
from avocado_jax.sampling.generate import caption_keys, draw_tokens
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Array, Bool, Clip, Int

STEPS = 16  # decoding steps per dispatch; a finished slot waits for half of them on average
WINDOW = 256  # smallest window of the caption caches read by a dispatch; larger windows are doublings of it


class Slots(NamedTuple):
    """The state of S slots. An empty slot has `stopped` set."""

    cache: ClipCache
    caption_kv: Any  # the captions' keys and values
    keys: Array  # data of a random key for each slot, [S 1 ...]
    step: Int[Array, "S"]  # number of tokens of the caption
    last: Int[Array, "S 1"]  # the newest token
    stopped: Bool[Array, "S"]
    tokens: Int[Array, "S C"]


def slot_shardings(slots: Slots, mesh: Mesh) -> Slots:
    """The shardings of the slots: caches are sharded by slots, and by heads over `tensor`; other leaves are replicated.

    The specs omit axes of size 1, as XLA does. Otherwise the arrays that a program returns would not have the shardings
    for which the next program was compiled.
    """
    rows = tuple(axis for axis in ROWS if mesh.shape[axis] > 1)
    rows = rows[0] if len(rows) == 1 else rows or None

    def sharding(*axes: Any) -> NamedSharding:
        while axes and axes[-1] is None:
            axes = axes[:-1]
        return NamedSharding(mesh, PartitionSpec(*axes))

    def heads(leaf: Any, axis: int) -> NamedSharding:
        divided = mesh.shape["tensor"] > 1 and leaf.shape[axis] % mesh.shape["tensor"] == 0
        return sharding(rows, *[None] * (axis - 1), "tensor" if divided else None)

    return Slots(
        ClipCache(jax.tree.map(partial(heads, axis=1), slots.cache.layers), sharding(rows), sharding(rows)),
        jax.tree.map(partial(heads, axis=2), slots.caption_kv),
        *(sharding() for _ in slots[2:]),
    )


def _sharded(slots: Slots, mesh: Mesh | None) -> Slots:
    return slots if mesh is None else jax.lax.with_sharding_constraint(slots, slot_shardings(slots, mesh))


@partial(jax.jit, static_argnames=("config", "mesh", "clip_tokens", "slots", "length"))
@traced_on_mesh
def empty(config: ThinkerConfig, mesh: Mesh | None, clip_tokens: int, slots: int, length: int) -> Slots:
    """Allocate slots for clips of `clip_tokens` tokens and captions of `length` tokens."""
    kv = caption_cache(config, slots, 1, clip_tokens)
    return _sharded(
        Slots(
            ClipCache(
                jax.tree.map(lambda leaf: leaf[:, 0], kv),
                jnp.zeros((slots, clip_tokens), bool),
                jnp.zeros(slots, jnp.int32),
            ),
            caption_cache(config, slots, 1, -(-length // STEPS) * STEPS),  # a multiple of the steps per dispatch
            jax.random.key_data(caption_keys(jax.random.key(0), jnp.zeros(slots, jnp.int32), 1)),
            jnp.zeros(slots, jnp.int32),
            jnp.zeros((slots, 1), jnp.int32),
            jnp.ones(slots, bool),
            jnp.zeros((slots, length), jnp.int32),
        ),
        mesh,
    )


def slot_shapes(config: ThinkerConfig, mesh: Mesh, clip_tokens: int, slots: int, length: int) -> Slots:
    """The result of `empty` as shapes with shardings."""

    def shape(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    made = jax.eval_shape(partial(empty, config, mesh, clip_tokens, slots, length))
    return jax.tree.map(shape, made, slot_shardings(made, mesh))


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=0)
@traced_on_mesh
def admit(
    slots: Slots,
    params: Any,
    clips: Clip,
    encoded: Encoded | None,
    seed: Array,
    numbers: Int[Array, "N"],
    index: Int[Array, "D M"],
    config: ThinkerConfig,
    mesh: Mesh | None,
) -> Slots:
    """Prefill N = D x M clips and insert them.

    Args:
        clips: clips sharded by rows over a mesh. Clip d M + m is on data shard d and enters its slot `index[d, m]`.
        encoded: encoder outputs of the clips; None: run the encoders.
        seed: seed of the random draws, combined with each clip's entry of `numbers`.
        index: slot of each clip in its shard; clips with an index past the last slot are not inserted.
    """
    cache = Thinker(config).apply({"params": params}, clips, encoded, method="prefill")
    keys = jax.random.key_data(caption_keys(jax.random.key(seed), numbers, 1))
    shards, together = index.shape

    def by_shard(leaf: Array) -> Array:
        return leaf.reshape(shards, len(leaf) // shards, *leaf.shape[1:])

    def insert(old: Array, new: Array, at: Array) -> Array:
        """Insert one clip into a shard's slots. The index is clipped, because scatters over a mesh do not drop any."""
        slot = jnp.minimum(at, len(old) - 1)
        kept = jnp.where(at < len(old), new, jax.lax.dynamic_index_in_dim(old, slot, keepdims=False))
        return jax.lax.dynamic_update_index_in_dim(old, kept, slot, 0)

    now = slots.cache, slots.keys, slots.step, slots.last, slots.stopped
    new = cache, keys, jnp.zeros_like(numbers), clips.first[:, None], jnp.zeros_like(numbers, bool)
    inserted, divided = (jax.tree.map(by_shard, tree) for tree in (now, new))
    for row in range(together):
        put = jax.vmap(insert)
        inserted = jax.tree.map(lambda old, new: put(old, new[:, row], index[:, row]), inserted, divided)  # noqa: B023
    inserted = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), inserted)
    return _sharded(Slots(inserted[0], slots.caption_kv, *inserted[1:], slots.tokens), mesh)


def window_of(length: int, step: int) -> int:
    """The window of caption caches of `length` tokens for a dispatch if captions have up to `step` tokens."""
    window = WINDOW
    while window < step:
        window *= 2
    return min(window, length)


@partial(jax.jit, static_argnames=("config", "mesh", "sampling", "stops", "window"), donate_argnums=0)
@traced_on_mesh
def advance(
    slots: Slots,
    params: Any,
    banned: Bool[Array, "V"],
    config: ThinkerConfig,
    mesh: Mesh | None,
    sampling: Sampling,
    stops: tuple[int, ...],
    window: int,
) -> Slots:
    """Decode up to `STEPS` tokens of every slot that has not stopped.

    Args:
        window: `window_of` the longest caption. The cache after the window is not read.
    """
    decode = partial(Thinker(config).apply, {"params": params}, method="decode")
    rows, length = jnp.arange(len(slots.step)), slots.tokens.shape[1]
    keys, read = (
        jax.random.wrap_key_data(slots.keys),
        jax.tree.map(lambda leaf: leaf[..., :window, :], slots.caption_kv),
    )

    def step(state: tuple[Array, Slots]) -> tuple[Array, Slots]:
        count, now = state
        caches = tuple(Growing(old, new, slots.step, count) for old, new in zip(read, now.caption_kv))
        logits, caption_kv = decode(now.cache, caches, now.step, now.last)
        token, _ = draw_tokens(logits, banned, keys, now.step, sampling)
        at = jnp.where(now.stopped, length, now.step)  # past the end: dropped
        ended = jnp.isin(token[:, 0], jnp.asarray(stops, jnp.int32)) | (now.step + 1 >= length)
        return count + 1, now._replace(
            caption_kv=caption_kv,
            step=now.step + ~now.stopped,
            last=token,
            stopped=now.stopped | ended,
            tokens=now.tokens.at[rows, at].set(token[:, 0], mode="drop"),
        )

    def unfinished(state: tuple[Array, Slots]) -> Bool[Array, ""]:
        return (state[0] < STEPS) & ~jnp.all(state[1].stopped)

    new = caption_cache(config, len(rows), 1, STEPS)
    begin = _sharded(slots._replace(caption_kv=new), mesh)
    _, after = jax.lax.while_loop(unfinished, step, (jnp.int32(0), begin))
    write = jax.vmap(partial(jax.lax.dynamic_update_slice_in_dim, axis=-2))
    kept = jax.tree.map(lambda old, new: write(old, new, slots.step), slots.caption_kv, after.caption_kv)
    return _sharded(after._replace(caption_kv=kept), mesh)

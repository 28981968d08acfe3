"""The programs of the captioning engine: allocate slots, prefill clips into them, decode all of them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.models.cache import ClipCache, caption_cache
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import Thinker
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.sampling.generate import caption_keys, draw_tokens
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Array, Bool, Clip, Int

STEPS = 16  # decoded in one dispatch: a slot that finishes waits for half of them on average


class Slots(NamedTuple):
    """The S slots of a lane. A slot that decodes nothing has `stopped` set."""

    cache: ClipCache
    so_far: Any  # the captions' keys and values
    keys: Array  # a random key for each slot, [S 1]
    step: Int[Array, "S"]  # tokens of the caption
    last: Int[Array, "S 1"]  # the newest token
    stopped: Bool[Array, "S"]
    tokens: Int[Array, "S C"]


def _sharded(slots: Slots, mesh: Mesh | None) -> Slots:
    """Caches sharded by slots, and by heads over `tensor`; what the host reads is replicated."""
    if mesh is None:
        return slots

    def constrain(leaf: Array, *axes: Any) -> Array:
        return jax.lax.with_sharding_constraint(leaf, NamedSharding(mesh, PartitionSpec(*axes)))

    def heads(leaf: Array, axis: int) -> Array:
        tensor = "tensor" if leaf.shape[axis] % mesh.shape["tensor"] == 0 else None
        return constrain(leaf, ROWS, *[None] * (axis - 1), tensor)

    return Slots(
        ClipCache(
            jax.tree.map(partial(heads, axis=1), slots.cache.layers),
            constrain(slots.cache.valid, ROWS),
            constrain(slots.cache.start, ROWS),
        ),
        jax.tree.map(partial(heads, axis=2), slots.so_far),
        *(constrain(leaf) for leaf in slots[2:]),
    )


@partial(jax.jit, static_argnames=("config", "mesh", "clip_tokens", "slots", "length"))
def empty(*, config: ThinkerConfig, mesh: Mesh | None, clip_tokens: int, slots: int, length: int) -> Slots:
    """Slots for clips of `clip_tokens` tokens and captions of `length` tokens."""
    kv = caption_cache(config, slots, 1, clip_tokens)
    return _sharded(
        Slots(
            ClipCache(
                jax.tree.map(lambda leaf: leaf[:, 0], kv),
                jnp.zeros((slots, clip_tokens), bool),
                jnp.zeros(slots, jnp.int32),
            ),
            caption_cache(config, slots, 1, length),
            caption_keys(jax.random.key(0), jnp.zeros(slots, jnp.int32), 1),
            jnp.zeros(slots, jnp.int32),
            jnp.zeros((slots, 1), jnp.int32),
            jnp.ones(slots, bool),
            jnp.zeros((slots, length), jnp.int32),
        ),
        mesh,
    )


@partial(jax.jit, static_argnames=("config", "mesh"), donate_argnums=0)
def admit(
    slots: Slots,
    params: Any,
    clips: Clip,
    which: Int[Array, "N"],
    seed: Array,
    numbers: Int[Array, "N"],
    index: Int[Array, "D M"],
    *,
    config: ThinkerConfig,
    mesh: Mesh | None,
) -> Slots:
    """Prefill N = D x M of the given clips and insert them.

    Clip `which[d M + m]` goes to slot `index[d, m]` of data shard d. An index past the last slot inserts nothing.
    """
    clips = jax.tree.map(lambda leaf: leaf[which], clips)
    if mesh is not None:
        clips = jax.lax.with_sharding_constraint(clips, NamedSharding(mesh, PartitionSpec(ROWS)))
    cache = Thinker(config).apply({"params": params}, clips, method="prefill")
    keys = caption_keys(jax.random.key(seed), numbers, 1)
    shards, together = index.shape

    def insert(old: Array, new: Array) -> Array:
        apart = old.reshape(shards, -1, *old.shape[1:]), new.reshape(shards, together, *new.shape[1:])
        put = jax.vmap(lambda old, new, at: old.at[at].set(new, mode="drop"))(*apart, index)
        return put.reshape(old.shape)

    inserted = jax.tree.map(
        insert,
        (slots.cache, slots.keys, slots.step, slots.last, slots.stopped),
        (cache, keys, jnp.zeros_like(numbers), clips.first[:, None], jnp.zeros_like(numbers, bool)),
    )
    return _sharded(Slots(inserted[0], slots.so_far, *inserted[1:], slots.tokens), mesh)


@partial(jax.jit, static_argnames=("config", "mesh", "sampling", "stops", "length"), donate_argnums=0)
def advance(
    slots: Slots,
    params: Any,
    banned: Bool[Array, "V"],
    *,
    config: ThinkerConfig,
    mesh: Mesh | None,
    sampling: Sampling,
    stops: tuple[int, ...],
    length: int,
) -> Slots:
    """Decode up to `STEPS` tokens of every slot that has not stopped."""
    decode = partial(Thinker(config).apply, {"params": params}, method="decode")
    rows = jnp.arange(len(slots.step))

    def step(state: tuple[Array, Slots]) -> tuple[Array, Slots]:
        count, now = state
        logits, so_far = decode(now.cache, now.so_far, now.step, now.last)
        token, _ = draw_tokens(logits, banned, now.keys, now.step, sampling)
        at = jnp.where(now.stopped, length, now.step)  # past the end: dropped
        ended = jnp.isin(token[:, 0], jnp.asarray(stops, jnp.int32)) | (now.step + 1 >= length)
        return count + 1, now._replace(
            so_far=so_far,
            step=now.step + ~now.stopped,
            last=token,
            stopped=now.stopped | ended,
            tokens=now.tokens.at[rows, at].set(token[:, 0], mode="drop"),
        )

    def unfinished(state: tuple[Array, Slots]) -> Bool[Array, ""]:
        return (state[0] < STEPS) & ~jnp.all(state[1].stopped)

    return _sharded(jax.lax.while_loop(unfinished, step, (jnp.int32(0), slots))[1], mesh)

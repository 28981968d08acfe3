"""Benchmark prefill and decode of one clip with random weights."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from avocado_jax.bench.measure import row, seconds_of
from avocado_jax.models.cache import KV, ClipCache, caption_cache
from avocado_jax.models.config import SIZES, ThinkerConfig, computed
from avocado_jax.models.flops import decode_bytes, row_flops
from avocado_jax.models.thinker import Thinker, init
from avocado_jax.parallel.rules import shardings
from avocado_jax.typing import Clip

FRAMES = {"tiny": (4, 8)}  # merged patches of a frame: rows, columns
FRAME = (16, 30)  # 448x840 pixels: a 30 s clip of 720p under AVoCaDO's budget


def random_clip(config: ThinkerConfig, tokens: int, cells: tuple[int, int]) -> Clip:
    """A random clip of `tokens` tokens in realistic proportions: a frame pair and 25 sound tokens per second."""
    vision, (rows, columns) = config.vision, cells
    window = vision.window_cells
    windows, slots = -(-rows // window) * -(-columns // window), (window * vision.merge) ** 2
    seconds = max(1, (tokens - 64) // (rows * columns + 25))
    chunks = -(-seconds // 2)
    pictures = rows * columns * seconds
    rng = np.random.default_rng(0)
    valid = np.arange(windows * slots).reshape(windows, slots) < rows * columns * vision.merge**2
    media = np.full(tokens, -1, np.int32)
    media[:pictures] = np.arange(pictures)
    return Clip(
        tokens=jnp.asarray(rng.integers(0, 400, (1, tokens)), jnp.int32),
        positions=jnp.broadcast_to(jnp.arange(tokens)[None, :, None], (1, tokens, 3)),
        length=jnp.full(1, tokens, jnp.int32),
        media=jnp.asarray(media[None]),
        first=jnp.zeros(1, jnp.int32),
        start=jnp.full(1, tokens, jnp.int32),
        patches=jnp.asarray(rng.integers(0, 256, (1, seconds, windows, slots, vision.patch_size)), jnp.uint8),
        patch_grid=jnp.zeros((1, windows, slots, 2), jnp.int32),
        patch_valid=jnp.asarray(valid[None]),
        mel=jnp.zeros((1, chunks, 2 * config.audio.window, config.audio.mel_bins), jnp.float32),
        mel_length=jnp.full((1, chunks), 2 * config.audio.window, jnp.int32),
    )


def random_policy(size: str, dtype: str, mesh: Mesh | None = None) -> tuple[ThinkerConfig, Any]:
    """A model with unrolled layers and small random weights; with a mesh, they are sharded over `tensor`."""
    config = computed(SIZES[size], dtype, scan=False)
    shapes = jax.eval_shape(partial(init, config), jax.random.key(0))
    leaves, tree = jax.tree.flatten(shapes)
    where = jax.tree.leaves(shardings(shapes, mesh, over=("tensor",))) if mesh else [None] * len(leaves)

    # Leaf by leaf: `init` would need twice the memory, in fp32.
    @partial(jax.jit, static_argnums=(1, 2))
    def make(key: jax.Array, leaf: jax.ShapeDtypeStruct, sharding: NamedSharding | None) -> jax.Array:
        made = 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        return jax.lax.with_sharding_constraint(made, sharding) if sharding else made

    keys = jax.random.split(jax.random.key(0), len(leaves))
    return config, tree.unflatten(make(*arguments) for arguments in zip(keys, leaves, where))


def bench_prefill(size: str, tokens: int, dtype: str) -> dict[str, Any]:
    """Encode one clip and prefill its cache."""
    config, params = random_policy(size, dtype)
    clip = random_clip(config, tokens, FRAMES.get(size, FRAME))
    prefill = jax.jit(partial(Thinker(config).apply, method="prefill"))
    seconds = seconds_of(lambda: prefill({"params": params}, clip))
    flops = row_flops(config, (tokens, *clip.patches.shape[1:3], clip.mel.shape[1]), 0, 0).total
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    return row("prefill", size, seconds, 1, tokens, flops, nbytes, dtype)


def bench_decode(size: str, group: int, clip_tokens: int, caption_tokens: int, dtype: str) -> dict[str, Any]:
    """Decode a group of captions of one clip with a filled cache, step by step as `generate` does."""
    config, params = random_policy(size, dtype)
    text = config.text
    shape = (1, text.kv_heads, clip_tokens, text.head)
    kv = tuple(KV(jnp.ones(shape, dtype), jnp.ones(shape, dtype)) for _ in range(text.layers))
    cache = ClipCache(kv, jnp.ones((1, clip_tokens), bool), jnp.full(1, clip_tokens))
    apply = partial(Thinker(config).apply, method="decode")

    @jax.jit
    def decode(params: Any, cache: ClipCache) -> jax.Array:
        def step(number: jax.Array, state: tuple) -> tuple:
            tokens, caption_kv = state
            logits, caption_kv = apply({"params": params}, cache, caption_kv, number, tokens)
            return jnp.argmax(logits, axis=-1).astype(jnp.int32), caption_kv

        start = (jnp.zeros((1, group), jnp.int32), caption_cache(config, 1, group, caption_tokens))
        return jax.lax.fori_loop(0, caption_tokens, step, start)[0]

    seconds = seconds_of(lambda: decode(params, cache))
    mean = caption_tokens / 2
    clip_only, both = (row_flops(config, (clip_tokens, 0, 0, 0), captions, caption_tokens) for captions in (0, group))
    flops = both.total - clip_only.total
    nbytes = caption_tokens * decode_bytes(config, clip_tokens, group, mean, jnp.dtype(dtype).itemsize)
    return row("decode", size, seconds, caption_tokens, group * caption_tokens, flops, nbytes, dtype)

"""The decoding loop: one token of each of G captions of B clips a step, until all captions have stopped."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.models.cache import caption_cache
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import Encoded, Thinker
from avocado_jax.parallel.parts import by_parts
from avocado_jax.sampling.logits import Sampling, draw
from avocado_jax.typing import Array, Bool, Clip, Float, Int


class Samples(NamedTuple):
    """Sampled captions. Tokens past a caption's length are the first stop id, their log-probabilities 0."""

    tokens: Int[Array, "B G C"]
    logprobs: Float[Array, "B G C"]  # of each token, as drawn (see `logits.draw`)
    lengths: Int[Array, "B G"]  # tokens of each caption, including the stop id if it was reached


class _Loop(NamedTuple):
    step: Int[Array, ""]
    last: Int[Array, "B G"]
    stopped: Bool[Array, "B G"]
    samples: Samples
    caption_kv: Any


def caption_keys(key: jax.Array, clips: Int[Array, "B"], captions: int) -> jax.Array:
    """A random key for each caption, [B G], from one key, the number of its clip and its index in the group.

    The draws of a caption do not depend on the other clips of its batch.
    """
    of_clip = jax.vmap(lambda clip: jax.random.fold_in(key, clip))(jnp.asarray(clips))
    return jax.vmap(lambda key: jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(captions)))(of_clip)


def draw_tokens(
    logits: Float[Array, "B G V"],
    banned: Bool[Array, "V"],
    keys: jax.Array,
    step: Int[Array, "B"] | Int[Array, ""],
    sampling: Sampling,
) -> tuple[Int[Array, "B G"], Float[Array, "B G"]]:
    """One token of each caption and its log-probability (`logits.draw`), by the caption's key and step."""

    def one(logits: Array, key: jax.Array, step: Array) -> tuple[Array, Array]:
        return draw(logits, banned, jax.random.fold_in(key, step), sampling)

    of_row = jax.vmap(one, in_axes=(0, 0, None))
    return jax.vmap(of_row, in_axes=(0, 0, 0 if step.ndim else None))(logits, keys, step)


@partial(jax.jit, static_argnames=("config", "sampling", "stops", "length", "parts"))
def generate(
    params: Any,
    clip: Clip,
    keys: jax.Array,
    banned: Bool[Array, "V"],
    encoded: Encoded | None = None,
    *,
    config: ThinkerConfig,
    sampling: Sampling,
    stops: tuple[int, ...],
    length: int,
    parts: int = 1,
) -> Samples:
    """Sample captions of clips.

    Args:
        params: parameters of `Thinker(config)`; separate layers (`config.scan` false) decode fastest.
        clip: B clips.
        keys: a key for each caption, [B G] (`caption_keys`).
        banned: ids that are never drawn: media placeholders, special tokens, rows without a token.
        encoded: encoder outputs of the clips; None: the encoders run here.
        stops: ids that end a caption.
        length: maximum number of tokens of a caption.
        parts: number of sequential parts that the clips are prefilled in; needs separate layers. Decoding is one batch.
    """
    apply = partial(Thinker(config).apply, {"params": params})
    cache = by_parts(partial(apply, method="prefill"), (clip, encoded), parts)
    rows, group = keys.shape
    stop_ids = jnp.asarray(stops, jnp.int32)

    def step(loop: _Loop) -> _Loop:
        logits, caption_kv = apply(cache, loop.caption_kv, loop.step, loop.last, method="decode")
        token, logprob = draw_tokens(logits, banned, keys, loop.step, sampling)
        token = jnp.where(loop.stopped, stops[0], token)
        logprob = jnp.where(loop.stopped, 0.0, logprob)
        old = loop.samples
        samples = Samples(
            jax.lax.dynamic_update_slice_in_dim(old.tokens, token[..., None], loop.step, axis=2),
            jax.lax.dynamic_update_slice_in_dim(old.logprobs, logprob[..., None], loop.step, axis=2),
            old.lengths + ~loop.stopped,
        )
        stopped = loop.stopped | jnp.any(token[..., None] == stop_ids[None, None], axis=-1)
        return _Loop(loop.step + 1, token, stopped, samples, caption_kv)

    loop = _Loop(
        jnp.int32(0),
        jnp.repeat(clip.first[:, None], group, axis=1),
        jnp.zeros((rows, group), bool),
        Samples(
            jnp.full((rows, group, length), stops[0], jnp.int32),
            jnp.zeros((rows, group, length), jnp.float32),
            jnp.zeros((rows, group), jnp.int32),
        ),
        caption_cache(config, rows, group, length),
    )

    def unfinished(loop: _Loop) -> Bool[Array, ""]:
        return (loop.step < length) & ~jnp.all(loop.stopped)

    return jax.lax.while_loop(unfinished, step, loop).samples

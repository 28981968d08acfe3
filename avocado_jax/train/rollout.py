"""Rollouts: what a policy says of a batch of clips, as the update reads it."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from avocado_jax.config import SamplingConfig
from avocado_jax.models.config import ThinkerConfig, computed
from avocado_jax.models.layers import unstacked
from avocado_jax.models.lora import merge
from avocado_jax.models.thinker import Encoded
from avocado_jax.parallel.rules import shardings
from avocado_jax.sampling.generate import Samples, caption_keys, generate
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Array, Bool, Captions, Clip, Float, Int

ROLLOUT = 5  # the purpose of these random numbers
WIDTHS = 2  # that captions are cut to, in equal parts of the limit; `score` and `update` are compiled for each
VIEW_OVER = ("tensor",)  # the axes that divide the sampler's weights


class Rollout(NamedTuple):
    """G sampled captions of each of B clips."""

    captions: Captions  # `valid` up to the stop, which counts
    sampled: Float[Array, "B G C"]  # log-probability of each token when it was drawn; 0 behind the stop
    lengths: Int[Array, "B G"]  # tokens, with the stop
    truncated: Bool[Array, "B G"]  # the limit came before a stop


def sampling_model(model: ThinkerConfig) -> ThinkerConfig:
    """The model that samples: in the dtype of activations, layers apart, adapters merged."""
    return replace(computed(model, model.dtype, scan=False), text=replace(model.text, lora=None))


def policy_view(params: Any, model: ThinkerConfig, mesh: Mesh, encoders: bool) -> Any:
    """A copy of the policy as decoding wants it: cast, unstacked, adapters merged.

    Each device of `fsdp` has it whole, since every step of decoding reads all weights; `tensor` still divides it.

    Args:
        encoders: keep the towers too; not needed where clips come encoded.
    """
    if model.text.lora:
        params = merge(params, model.text.lora)
    if not encoders:
        params = params | {"vision": {"merger": params["vision"]["merger"]}, "audio": {"proj": params["audio"]["proj"]}}
    view = jax.tree.map(lambda leaf: leaf.astype(model.dtype), unstacked(params))
    return jax.lax.with_sharding_constraint(view, shardings(view, mesh, over=VIEW_OVER))


def roll_out(
    view: Any,
    clip: Clip,
    encoded: Encoded | None,
    step: Int[Array, ""],
    banned: Bool[Array, "V"],
    *,
    model: ThinkerConfig,
    sampling: SamplingConfig,
    group: int,
    split: int,
    stops: tuple[int, ...],
    seed: int,
    parts: int = 1,
) -> Rollout:
    """Sample captions, `group` of each clip, which is `split` rows; a row's clip is read once for all of its own.

    What is drawn depends on (seed, step, clip, caption) alone. `model` is `sampling_model`'s; `generate` has the rest.
    """
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), ROLLOUT), step)
    rows = len(clip.tokens)
    keys = caption_keys(key, jnp.arange(rows // split), group).reshape(rows, group // split)
    samples = generate(
        view,
        clip,
        keys,
        banned,
        encoded,
        config=model,
        sampling=Sampling(sampling.temperature, sampling.top_k, sampling.top_p),
        stops=stops,
        length=sampling.tokens,
        parts=parts,
    )
    return as_rollout(samples, clip, stops)


def as_rollout(samples: Samples, clip: Clip, stops: tuple[int, ...]) -> Rollout:
    """Samples as teacher-forced captions: what counts is told by lengths, never guessed from the tokens."""
    rows, group, length = samples.tokens.shape
    first = jnp.broadcast_to(clip.first[:, None, None], (rows, group, 1))
    inputs = jnp.concatenate([first, samples.tokens[..., :-1]], axis=-1)
    valid = jnp.arange(length)[None, None] < samples.lengths[..., None]
    last = jnp.take_along_axis(samples.tokens, jnp.maximum(samples.lengths - 1, 0)[..., None], axis=-1)
    stopped = jnp.any(last == jnp.asarray(stops)[None, None], axis=-1)
    return Rollout(Captions(inputs, samples.tokens, valid), samples.logprobs, samples.lengths, ~stopped)


def widths(limit: int) -> tuple[int, ...]:
    """The widths that captions of at most `limit` tokens are cut to, ascending."""
    part = -(-limit // WIDTHS)
    return tuple(dict.fromkeys(min(limit, number * part) for number in range(1, WIDTHS + 1)))


def fitting(longest: int, limit: int) -> int:
    """The least of `widths(limit)` that holds captions of up to `longest` tokens."""
    return next(width for width in widths(limit) if width >= longest)


def cut(rollout: Rollout, width: int) -> Rollout:
    """Without the columns from `width` on, where no caption reaches: scores and gradients cost by the column."""
    captions = Captions(*(part[..., :width] for part in rollout.captions))
    return rollout._replace(captions=captions, sampled=rollout.sampled[..., :width])

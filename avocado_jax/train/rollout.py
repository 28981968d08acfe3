"""Rollouts: captions that a policy samples of a batch of clips, as the update reads them."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from avocado_jax.config import SamplingConfig
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import Encoded
from avocado_jax.parallel.mesh import constrain, parts_of, traced_on_mesh
from avocado_jax.sampling.generate import Samples, caption_keys, generate
from avocado_jax.sampling.logits import Sampling
from avocado_jax.typing import Array, Bool, Captions, Clip, Float, Int

ROLLOUT, SPARE = 5, 6  # purposes of random numbers
WIDTHS = 2  # to which captions are cropped, equal parts of the limit; `score` and `update` are compiled for each
VIEW_AXES = ("tensor",)  # the mesh axes that shard the sampler's weights: each decoding step reads all of them


class Rollout(NamedTuple):
    """G sampled captions of each of B clips."""

    captions: Captions  # `valid` up to and including the stop
    sampled: Float[Array, "B G C"]  # log-probability of each token, as drawn; 0 after the stop
    lengths: Int[Array, "B G"]  # tokens, including the stop
    truncated: Bool[Array, "B G"]  # reached the limit without a stop


@traced_on_mesh
def roll_out(
    view: Any,
    clips: tuple[Clip, ...],
    encoded: tuple[Encoded | None, ...],
    step: Int[Array, ""],
    banned: Bool[Array, "V"],
    *,
    model: ThinkerConfig,
    sampling: SamplingConfig,
    group: int,
    split: int,
    stops: tuple[int, ...],
    seed: int,
    mesh: Mesh,
    parts: int = 1,
    together: int = 1,
) -> tuple[Rollout, ...]:
    """Sample `group` captions of each clip of some batches, all together: a decoding step reads the weights once.

    A clip is `split` rows of its batch. In the rollout it is as few rows as occupy all shards (`rows_per_clip`): each
    row prefills the clip and reads its KV cache. The draws depend on (seed, step, clip, caption) alone. `generate`
    describes the other arguments.

    Args:
        view: the policy's `decoding_weights`; `model` is their config.
        clips, encoded: of batches of equal shapes: those of `together` steps from `step` on, or fewer, then spare ones.
        mesh: the mesh of `view`: the devices of the arguments in the same order.
        parts: microbatches of a batch: the prefill takes as many rows at a time.

    Returns:
        The rollout of each batch.
    """
    rows, count = len(clips[0].tokens), len(clips)
    purpose, spare = (jax.random.fold_in(jax.random.key(seed), number) for number in (ROLLOUT, SPARE))
    steps = [jax.random.fold_in(purpose, step + number) for number in range(min(count, together))]
    spare = jax.random.fold_in(spare, step)
    steps += [jax.random.fold_in(spare, number) for number in range(count - len(steps))]
    keys = jnp.stack([caption_keys(key, jnp.arange(rows // split), group) for key in steps])
    kept = rows_per_clip(rows // split * count, split, parts_of("rows") * parts)

    def interleave(*leaves: Array) -> Array:
        """The first `kept` rows of each clip, in the order of rows, then batches: most stay on their device."""
        batches = jnp.stack(leaves, axis=1)
        batches = batches.reshape(-1, split, *batches.shape[1:])[:, :kept]
        return constrain(batches.reshape(-1, *leaves[0].shape[1:]), "rows")

    samples = generate(
        view,
        jax.tree.map(interleave, *clips),
        keys.reshape(count, -1, group // kept).swapaxes(0, 1).reshape(-1, group // kept),
        banned,
        jax.tree.map(interleave, *encoded),
        config=model,
        sampling=Sampling(sampling.temperature, sampling.top_k, sampling.top_p),
        stops=stops,
        length=sampling.tokens,
        parts=prefill_parts(parts, count, kept, split),
    )

    def of_batch(leaf: Array, number: int) -> Array:
        """Rows of a batch as its clip has them."""
        captions = leaf.reshape(-1, count, *leaf.shape[1:])[:, number]
        return captions.reshape(rows, group // split, *leaf.shape[2:])

    batches = (jax.tree.map(partial(of_batch, number=number), samples) for number in range(count))
    return tuple(as_rollout(samples, clip, stops) for samples, clip in zip(batches, clips))


def rows_per_clip(clips: int, split: int, shards: int) -> int:
    """The rows that each clip of a rollout is divided into: as few as give every shard equally many.

    Args:
        clips: of all batches of the rollout.
        split: rows of a clip in its batch.
        shards: by which the rows of the rollout must be divided.
    """
    return next((rows for rows in range(1, split) if split % rows == 0 and clips * rows % shards == 0), split)


def prefill_parts(parts: int, batches: int, kept: int, split: int) -> int:
    """The sequential parts that a rollout is prefilled in, to limit activations: each has the rows of a microbatch.

    Args:
        parts: microbatches of a batch.
        batches: of the rollout.
        kept: rows of a clip in the rollout.
        split: rows of a clip in its batch.
    """
    return parts * batches * kept // split if batches * kept % split == 0 else parts


def as_rollout(samples: Samples, clip: Clip, stops: tuple[int, ...]) -> Rollout:
    """Samples as teacher-forced captions. The mask comes from the lengths, never from the tokens."""
    rows, group, length = samples.tokens.shape
    first = jnp.broadcast_to(clip.first[:, None, None], (rows, group, 1))
    inputs = jnp.concatenate([first, samples.tokens[..., :-1]], axis=-1)
    valid = jnp.arange(length)[None, None] < samples.lengths[..., None]
    last = jnp.take_along_axis(samples.tokens, jnp.maximum(samples.lengths - 1, 0)[..., None], axis=-1)
    stopped = jnp.any(last == jnp.asarray(stops)[None, None], axis=-1)
    return Rollout(Captions(inputs, samples.tokens, valid), samples.logprobs, samples.lengths, ~stopped)


def widths(limit: int) -> tuple[int, ...]:
    """The widths to which captions of at most `limit` tokens are cropped, ascending."""
    part = -(-limit // WIDTHS)
    return tuple(dict.fromkeys(min(limit, number * part) for number in range(1, WIDTHS + 1)))


def smallest_width(longest: int, limit: int) -> int:
    """The smallest of `widths(limit)` that fits captions of up to `longest` tokens."""
    return next(width for width in widths(limit) if width >= longest)


def crop(rollout: Rollout, width: int) -> Rollout:
    """Remove the columns from `width` on, which no caption reaches: the cost of scores and gradients is per column."""
    captions = Captions(*(part[..., :width] for part in rollout.captions))
    return rollout._replace(captions=captions, sampled=rollout.sampled[..., :width])

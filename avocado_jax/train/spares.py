"""Spare clips of a rollout, which replace clips whose captions all have the same reward (DAPO, 3.2).

B  clips of a batch      S  spare clips      G  captions of a clip

A group of equal rewards has no advantage, so its rollout is wasted. With `oversample` it is excluded from updates: the
next spare group with different rewards replaces it, or its weight becomes 0 if no spare remains. Shapes do not depend
on the number of replaced groups.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig
from avocado_jax.models.thinker import Encoded
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.train.objective import zero_variance
from avocado_jax.train.programs import StepShapes, by_rows
from avocado_jax.train.rollout import Rollout
from avocado_jax.typing import Array, Bool, Clip, Float, Int


class Sampled(NamedTuple):
    """Clips and captions with advantages. Leaves have a leading row axis, with `split` rows per clip."""

    clip: Clip
    encoded: Encoded | None
    rollout: Rollout
    advantage: Float[Array, "B G"]
    weight: Float[Array, "B"]


def choose(equal: Bool[Array, "B"], usable: Bool[Array, "S"]) -> tuple[Int[Array, "B"], Bool[Array, "S"]]:
    """Assign the usable spares to the groups of equal rewards, in order.

    Returns:
        For each group the index of its spare, or -1; and the mask of assigned spares.
    """
    order, rank = jnp.cumsum(equal) - 1, jnp.cumsum(usable) - 1
    pairs = equal[:, None] & usable[None] & (order[:, None] == rank[None])
    return jnp.where(jnp.any(pairs, axis=1), jnp.argmax(pairs, axis=1), -1), jnp.any(pairs, axis=0)


def replace_groups(
    batch: Sampled,
    reward: Float[Array, "B G"],
    spares: tuple[Sampled, ...],
    rewards: tuple[Float[Array, "B G"], ...],
    spent: Bool[Array, "S"],
) -> tuple[Sampled, Bool[Array, "S"], Bool[Array, "S"], dict[str, Array]]:
    """Replace the groups of equal rewards in a batch. The weight becomes 0 for groups without a spare.

    Args:
        spares, rewards: samples and rewards of the rollout's spare batches, each of the size of `batch`.
        spent: mask of the spares used by earlier batches of this rollout.

    Returns:
        The batch for the update; the mask of its spares; `spent` including these; and metrics: the numbers of groups
        `replaced` and `dropped`; `all_equal`, 1 if groups were dropped and none remains; and `rows`, the number of
        clips read.
    """
    split = len(batch.weight) // len(reward)
    counts = batch.weight[::split] > 0
    equal = zero_variance(reward) & counts
    usable = ~zero_variance(jnp.concatenate(rewards)) & ~spent
    usable &= jnp.concatenate([spare_batch.weight[::split] for spare_batch in spares]) > 0
    spare, taken = choose(equal, usable)
    source = jnp.where(spare < 0, jnp.arange(len(spare)), len(spare) + spare)
    rows = (source[:, None] * split + jnp.arange(split)[None]).reshape(-1)
    dropped = equal & (spare < 0)

    def take(*leaves: Array) -> Array:
        return jnp.concatenate(leaves)[rows]

    learned: Any = jax.tree.map(take, batch, *spares)
    learned = learned._replace(weight=jnp.where(jnp.repeat(dropped, split), 0, learned.weight))
    metrics = {
        "replaced": jnp.sum(taken),
        "dropped": jnp.sum(dropped),
        "all_equal": (jnp.any(dropped) & ~jnp.any(learned.weight > 0)).astype(jnp.int32),
        "rows": jnp.sum(counts).astype(jnp.float32),
    }
    return learned, taken, spent | taken, metrics


def replacement_shapes(config: GrpoConfig, shapes: StepShapes, mesh: Mesh) -> tuple[Any, ...]:
    """The shapes of the arguments of `replace_groups`."""
    replicated, (clip, _, weight, _) = NamedSharding(mesh, PartitionSpec()), shapes.batch
    advantage = by_rows(jax.ShapeDtypeStruct(shapes.rollout.lengths.shape, jnp.float32), mesh)
    batch = Sampled(clip, shapes.encoded, shapes.rollout, advantage, weight)
    reward = jax.ShapeDtypeStruct((config.batch, config.group), jnp.float32, sharding=replicated)
    spent = jax.ShapeDtypeStruct((config.oversample,), jnp.bool_, sharding=replicated)
    count = config.oversample // config.batch
    return batch, reward, (batch,) * count, (reward,) * count, spent


def replacement(mesh: Mesh) -> Callable[..., tuple[Sampled, Array, Array, dict[str, Array]]]:
    """`replace_groups`, jitted."""
    replicated = NamedSharding(mesh, PartitionSpec())
    return jax.jit(replace_groups, out_shardings=(rows_sharding(mesh), replicated, replicated, replicated))

"""Spare clips of a rollout, which replace clips whose captions all have the same reward (DAPO, 3.2).

B  clips of a batch      S  spare clips      G  captions of a clip

Such a group has no advantage, so that its rollout is wasted. With `oversample` it never reaches an update: the next
spare group with different rewards takes its place, and where none is left it has no weight. Shapes do not depend on how
many are replaced.
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
    """Clips and their captions with advantages; leaves have a leading axis of rows, which are `split` a clip."""

    clip: Clip
    encoded: Encoded | None
    rollout: Rollout
    advantage: Float[Array, "B G"]
    weight: Float[Array, "B"]


def choose(equal: Bool[Array, "B"], usable: Bool[Array, "S"]) -> tuple[Int[Array, "B"], Bool[Array, "S"]]:
    """The first of the equal groups is replaced by the first usable spare, and so on.

    Returns:
        For each group the spare that replaces it, or -1, and the spares that replace one.
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
    """Replace the groups of equal rewards in a batch; those for which no spare is left have a weight of 0.

    Args:
        spares, rewards: of the spare batches of the rollout, each as large as `batch`.
        spent: spares that replaced a group of an earlier batch of this rollout.

    Returns:
        The batch to learn from; the spares that it contains; `spent` with these; and metrics: numbers of groups
        `replaced` and `dropped`, `all_equal`, 1 if groups were dropped and none is left, and `rows`, the clips that
        were read.
    """
    split = len(batch.weight) // len(reward)
    counts = batch.weight[::split] > 0
    equal = zero_variance(reward) & counts
    usable = ~zero_variance(jnp.concatenate(rewards)) & ~spent
    usable &= jnp.concatenate([one.weight[::split] for one in spares]) > 0
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
    """The arguments of `replace_groups` in a step."""
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

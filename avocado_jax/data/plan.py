"""The global batch plan: the records of each step, computed by every host without communication.

The plan is a pure function of (index, seed, step, batch size, buckets). Each epoch contains every record once:

1. The records of the epoch are shuffled and assigned, in that order, to the cheapest bucket that fits. A full block
   is `together` consecutive batches of the same bucket, by default one, followed by `spares` further ones.
2. The remaining records of each bucket are filled up with remaining records of buckets that fit inside it, so that
   few blocks stay short. Their empty positions are rows of zero weight (record -1), in spare batches first, then spread
   over the others.
3. The blocks of the epoch are shuffled.

No state passes from one epoch to the next: all epochs have the same number of steps, and any step can be computed
independently.
"""

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from avocado_jax.data.index import Sizes
from avocado_jax.data.rows import Shape
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.flops import row_flops as count_flops
from avocado_jax.typing import Array, Float, Int

EPOCH, STEPS = 1, 2  # purposes of random keys


class Bucket(NamedTuple):
    """One compiled shape."""

    shape: Shape
    caption: int  # tokens of a caption


class Step(NamedTuple):
    """A batch of all processes."""

    step: int  # number of the batch (`Plan.position`)
    epoch: int
    bucket: Bucket
    records: Int[Array, "B"]  # numbers in the index; -1 is a row of zero weight
    padded: float  # share of the step's FLOPs spent on padding, partial windows of a clip excluded


def row_flops(sizes: Array, group: int, config: ThinkerConfig) -> Float[Array, "N"]:
    """Forward FLOPs of rows whose sizes are the columns of `sizes` [N 5]: Shape's four, then caption tokens."""
    *shape, caption = np.asarray(sizes, np.float64).T
    return count_flops(config, shape, group, caption).total


def choose_buckets(
    sizes: Sizes, count: int, group: int, config: ThinkerConfig, aligned: tuple[int, int] = (128, 64)
) -> list[Bucket]:
    """Choose at most `count` shapes that fit all records with few FLOPs of padding, most expensive first.

    Shapes are merged pairwise, smallest loss first, until `count` remain. Then records move to the cheapest bucket
    that fits and buckets shrink to their records, as long as this reduces the FLOPs.

    Args:
        aligned: clip tokens and caption tokens are rounded up to multiples of these, for attention kernels.
    """
    table = _table(sizes)
    for column, unit in ((0, aligned[0]), (4, aligned[1])):
        table[:, column] = -(-table[:, column] // unit) * unit
    kinds, members = np.unique(_coarse(table, 1500), axis=0, return_counts=True)
    boxes = _merged(kinds, members, count, group, config)
    cost = np.inf
    while True:
        chosen = _cheapest_box(table, boxes, group, config)
        boxes = np.array([table[chosen == number].max(axis=0) for number in np.unique(chosen)])
        if (now := row_flops(boxes, group, config)[_cheapest_box(table, boxes, group, config)].sum()) >= cost:
            break
        cost = now
    boxes = boxes[np.argsort(-row_flops(boxes, group, config), kind="stable")]
    return [Bucket(Shape(*box[:4]), box[4]) for box in boxes.tolist()]


def _table(sizes: Sizes) -> Int[Array, "N 5"]:
    return np.column_stack([*sizes.shape, sizes.caption]).astype(np.int64)


def _coarse(table: Array, most: int) -> Array:
    """Round sizes up until at most `most` distinct ones remain: merging is quadratic in their number."""
    bits = 8
    while len(np.unique(rounded := _round_up(table, bits), axis=0)) > most:
        bits -= 1
    return rounded


def _round_up(table: Array, bits: int) -> Array:
    """Each size rounded up to `bits` leading bits."""
    unit = 1 << np.maximum(np.floor(np.log2(np.maximum(table, 1))).astype(int) + 1 - bits, 0)
    return -(-table // unit) * unit


def _merged(boxes: Array, members: Array, count: int, group: int, config: ThinkerConfig) -> Array:
    """Repeatedly merge the pair of boxes whose union adds the least cost, until `count` remain."""
    cost = row_flops(boxes, group, config)

    def losses(first: int, others: Array) -> Array:
        joint = row_flops(np.maximum(boxes[first], boxes[others]), group, config)
        separate = members[first] * cost[first] + members[others] * cost[others]
        return (members[first] + members[others]) * joint - separate

    boxes, members, everyone = boxes.copy(), members.copy(), np.arange(len(boxes))
    loss = np.stack([losses(first, everyone) for first in range(len(boxes))])
    np.fill_diagonal(loss, np.inf)
    alive = np.ones(len(boxes), bool)
    for _ in range(len(boxes) - count):
        first, second = divmod(int(np.argmin(loss)), len(boxes))
        boxes[first] = np.maximum(boxes[first], boxes[second])
        members[first] += members[second]
        cost[first] = row_flops(boxes[first : first + 1], group, config)[0]
        alive[second] = False
        loss[second, :] = loss[:, second] = np.inf
        fresh = np.where(alive & (everyone != first), losses(first, everyone), np.inf)
        loss[first, :] = loss[:, first] = fresh
    return boxes[alive]


def _cheapest_box(table: Array, boxes: Array, group: int, config: ThinkerConfig) -> Int[Array, "N"]:
    """The index of the cheapest box that fits each row of sizes.

    Raises:
        InputError: no box fits a row.
    """
    chosen = np.full(len(table), -1, np.int16)
    for number in np.argsort(-row_flops(boxes, group, config), kind="stable"):
        chosen[(table <= boxes[number]).all(axis=1)] = number
    if (chosen < 0).any():
        worst = int(np.argmax(chosen < 0))
        raise InputError(f"record {worst} of sizes {table[worst].tolist()} fits none of the buckets")
    return chosen


@dataclass(frozen=True, eq=False)
class Plan:
    """The steps of a run. Equal arguments give equal plans on every host."""

    buckets: tuple[Bucket, ...]  # most expensive first
    costs: Float[Array, "buckets"]  # FLOPs of a row of each bucket
    assigned: Int[Array, "N"]  # bucket of each record
    needs: Float[Array, "N"]  # FLOPs of each record's row without padding
    batch: int  # rows of all processes
    seed: int
    together: int = 1  # consecutive batches with the same bucket, one per training step
    spares: int = 0  # spare batches after these, with the same bucket and without a step

    @property
    def epoch_steps(self) -> int:
        """Batches of an epoch, the same for every epoch; a multiple of `together` + `spares`."""
        return len(_epoch(self, 0))

    def position(self, step: int) -> int:
        """The number of a training step's batch; it is the step if there are no spare batches."""
        block, within = divmod(step, self.together)
        return block * (self.together + self.spares) + within

    def spare_positions(self, step: int) -> range:
        """The numbers of the spare batches in the block of a training step."""
        end = self.position(step // self.together * self.together) + self.together
        return range(end, end + self.spares)

    def step(self, step: int) -> Step:
        """Bucket and records of a batch."""
        epoch, within = divmod(step, self.epoch_steps)
        bucket, records = _epoch(self, epoch)[within]
        padded = 1 - self.needs[records[records >= 0]].sum() / (self.batch * self.costs[bucket])
        return Step(step, epoch, self.buckets[bucket], records, float(padded))

    @property
    def digest(self) -> str:
        """Digest of all inputs of the plan. Hosts compare it; a checkpoint's step is valid for one digest."""
        together = (self.together,) if self.together > 1 or self.spares else ()
        spares = (self.spares,) if self.spares else ()
        inputs = repr((self.buckets, self.batch, self.seed, *together, *spares)).encode() + self.assigned.tobytes()
        return hashlib.md5(inputs, usedforsecurity=False).hexdigest()

    def padded_share(self) -> float:
        """Share of an epoch's FLOPs spent on padding, rows of zero weight included."""
        return float(1 - self.needs.sum() / (self.batch * self.costs[[bucket for bucket, _ in _epoch(self, 0)]].sum()))


def make_plan(
    sizes: Sizes,
    buckets: list[Bucket],
    batch: int,
    seed: int,
    group: int,
    config: ThinkerConfig,
    together: int = 1,
    spares: int = 0,
) -> Plan:
    """Assign each record to the cheapest bucket that fits.

    Raises:
        InputError: there are no records, or no bucket fits one.
    """
    if not len(sizes.caption):
        raise InputError("the data set has no records")
    boxes = np.array([(*bucket.shape, bucket.caption) for bucket in buckets])
    costs = row_flops(boxes, group, config)
    order = np.argsort(-costs, kind="stable")
    assigned = _cheapest_box(_table(sizes), boxes[order], group, config)
    needs = row_flops(_table(sizes), group, config)
    return Plan(
        tuple(buckets[number] for number in order), costs[order], assigned, needs, batch, seed, together, spares
    )


@lru_cache(maxsize=4)
def _epoch(plan: Plan, epoch: int) -> list[tuple[int, Int[Array, "B"]]]:
    """All batches of an epoch: (bucket, records)."""
    order = np.random.default_rng([plan.seed, EPOCH, epoch]).permutation(len(plan.assigned))
    learned = plan.batch * plan.together
    blocks, left, size = [], [], learned + plan.batch * plan.spares
    for bucket in range(len(plan.buckets)):
        chosen = order[plan.assigned[order] == bucket]
        full = len(chosen) // size * size
        blocks += [(bucket, rows) for rows in chosen[:full].reshape(-1, size)]
        left.append(chosen[full:].tolist())
    boxes = [(*bucket.shape, bucket.caption) for bucket in plan.buckets]
    for bucket, box in enumerate(boxes):
        for smaller in range(bucket + 1, len(boxes)):
            if left[bucket] and all(part <= limit for part, limit in zip(boxes[smaller], box)):
                space = size - len(left[bucket])
                left[bucket] += left[smaller][:space]
                left[smaller] = left[smaller][space:]
        if left[bucket]:
            blocks.append((bucket, np.array(left[bucket] + [-1] * (size - len(left[bucket])))))
    shuffle = np.random.default_rng([plan.seed, STEPS, epoch]).permutation(len(blocks))
    found = []
    for bucket, records in (blocks[number] for number in shuffle):
        spread = [records[:learned][step :: plan.together] for step in range(plan.together)]
        found += [(bucket, rows) for rows in (*spread, *records[learned:].reshape(plan.spares, plan.batch))]
    return found

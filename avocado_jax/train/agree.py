"""Batches on the mesh whose rows are the same on every process.

A row counts only if every process that loads it has read it and, where a clip is `split` rows, only if all rows of its
clip were read. All others become the same empty row on every device: replicas of one array never differ, and nothing
of a lost record reaches the step.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import cache, partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from avocado_jax.data.pipeline import Batch, Recipe, empty_row
from avocado_jax.data.plan import Bucket
from avocado_jax.parallel.batches import prefetch_to_mesh, process_rows, rows_sharding
from avocado_jax.parallel.compiled import Program
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.parallel.replicas import observation_sharding, observe
from avocado_jax.train.programs import by_rows
from avocado_jax.typing import Array, Captions, Clip, Float, Int

References = Callable[[Sequence[Mapping[str, Any]]], Any]


class _Contents(NamedTuple):
    """What the step reads of rows."""

    clip: Clip
    captions: Captions | None
    truncated: Int[Array, "B"]
    references: Any


def agreed_batches(
    batches: Iterator[Batch],
    mesh: Mesh,
    recipe: Recipe,
    rows: int,
    split: int = 1,
    references: References | None = None,
) -> Iterator[Batch]:
    """Prefetch the batches of this process to the mesh, and agree on which of their rows count.

    Agreement is a computation on the devices, dispatched by the thread that takes the batches.

    Args:
        batches: of this process; its rows are `process_rows(mesh, rows, jax.process_index())`.
        rows: of a batch, on all processes together.
        split: rows of each clip.
        references: makes what rewards compare with, as numpy arrays [B, ...], from the records of rows. It runs in
            the prefetching thread.
    """
    local = process_rows(mesh, rows, jax.process_index())
    agree = _agree(mesh, split)
    empty = cache(lambda bucket: _compact(_empty(recipe, bucket, references)))

    def prepared() -> Iterator[Batch]:
        with closing(batches):
            for batch in batches:
                if references:
                    batch = batch._replace(references=references(batch.records))
                yield batch._replace(weight=observe(mesh, local, rows, batch.weight))

    def agreed(batch: Batch) -> Batch:
        contents = _Contents(batch.clip, batch.captions, batch.truncated, batch.references)
        contents, weight = agree(contents, batch.weight, empty(batch.bucket))
        return batch._replace(**contents._asdict(), weight=weight)

    with closing(prefetch_to_mesh(prepared(), mesh)) as prefetched:
        for batch in prefetched:
            yield agreed(batch)


def agreement(
    mesh: Mesh, recipe: Recipe, bucket: Bucket, rows: int, split: int = 1, references: References | None = None
) -> Program:
    """The program of `agreed_batches` for the batches of a bucket."""
    empty = _empty(recipe, bucket, references)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype), empty)
    sharding = observation_sharding(mesh)
    replicas = mesh.size // math.prod(mesh.shape[axis] for axis in ROWS)
    observed = jax.ShapeDtypeStruct((replicas, rows), jnp.float32, sharding=sharding)
    return Program("the agreement", _agree(mesh, split), (by_rows(shapes, mesh), observed, _compact(empty)))


def _empty(recipe: Recipe, bucket: Bucket, references: References | None) -> _Contents:
    clip, captions = empty_row(recipe, bucket)
    compared = references([{}]) if references else None
    return _Contents(clip, captions, np.zeros(1, np.int32), compared)


def _compact(row: _Contents) -> _Contents:
    """The same row for broadcasting: arrays of zeros have sizes of 1, so that little is sent to the devices."""
    return jax.tree.map(lambda leaf: leaf if leaf.any() else np.zeros((1,) * leaf.ndim, leaf.dtype), row)


@cache
def _agree(mesh: Mesh, split: int) -> Callable[[_Contents, Array, _Contents], tuple[_Contents, Float[Array, "B"]]]:
    """Jitted (contents, observed weight [R B], an empty row) -> (agreed contents, agreed weight [B])."""

    @partial(jax.jit, donate_argnums=0, out_shardings=rows_sharding(mesh))
    def agree(contents: _Contents, observed: Array, empty: _Contents) -> tuple[_Contents, Array]:
        of_clips = jnp.min(observed, axis=0).reshape(-1, split).min(axis=1)
        weight = jnp.repeat(of_clips, split)

        def select(leaf: Array, blank: Array) -> Array:
            return jnp.where((weight > 0).reshape(-1, *[1] * (leaf.ndim - 1)), leaf, blank)

        return jax.tree.map(select, contents, empty), weight

    return agree


def lost_records(batch: Batch, mesh: Mesh) -> Iterator[str]:
    """A line for each record of this process's rows that does not count: why, or that it was lost elsewhere."""
    reasons = {lost.id: lost.reason for lost in batch.lost}
    rows, weight = len(batch.weight), {}
    for shard in batch.weight.addressable_shards:
        weight |= zip(range(*shard.index[0].indices(rows)), np.asarray(shard.data).tolist())
    local = process_rows(mesh, rows, jax.process_index())
    for name in dict.fromkeys(name for name, row in zip(batch.ids, local) if name and not weight[row]):
        yield f"{name} is lost: {reasons.get(name, 'another process could not read it')}"

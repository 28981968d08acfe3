"""Transfer batches to the mesh and make replicated rows equal on all processes.

A row keeps its weight only if every process that loads it has read it, and, if a clip has `split` rows, only if all its
rows were read. Other rows are replaced by the same empty row on every device, so that replicas never differ and lost
records do not influence the step.
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
    """The inputs of a step."""

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
    """Prefetch the batches of this process to the mesh, and agree on the rows with weight.

    The agreement is a computation on the devices, dispatched by the consumer's thread.

    Args:
        batches: batches of this process, with the rows `process_rows(mesh, rows, jax.process_index())`.
        rows: rows of a batch over all processes.
        split: rows of each clip.
        references: records of rows -> reward references as numpy arrays [B, ...]. Called in the prefetching thread.
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
    """Shrink arrays of zeros to size 1 for broadcasting, which reduces transfers to the devices."""
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
    """Yield a line for each lost record of this process's rows, with the reason."""
    reasons = {lost.id: lost.reason for lost in batch.lost}
    rows, weight = len(batch.weight), {}
    for shard in batch.weight.addressable_shards:
        weight |= zip(range(*shard.index[0].indices(rows)), np.asarray(shard.data).tolist())
    local = process_rows(mesh, rows, jax.process_index())
    for name in dict.fromkeys(name for name, row in zip(batch.ids, local) if name and not weight[row]):
        yield f"{name} is lost: {reasons.get(name, 'another process could not read it')}"

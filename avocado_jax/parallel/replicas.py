"""Values that processes observe independently of each other, for rows that several processes load.

Where the mesh axes that replicate rows span processes, every row has several loading processes, and each of them may
observe something else: one reads a record that another could not read. Such values must not become replicas of one
array, which XLA assumes to be equal. `observe` gives each device a slot of its own; a reduction over the slots, inside
a jitted function, gives all processes the same value. Host collectives would need the same order of calls in all
threads of all processes; computations on the devices have it.
"""

import math
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.parallel.batches import process_rows
from avocado_jax.parallel.mesh import ROWS
from avocado_jax.typing import Array, Shaped


def observation_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [replicas, rows, ...]: one replica of each row for each device that holds the row."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in mesh.axis_names if axis not in ROWS), ROWS))


def observe(
    mesh: Mesh, rows: Sequence[int], batch: int, values: Shaped[np.ndarray, "N ..."]
) -> Shaped[Array, "R B ..."]:
    """A global array of what each process observes of the rows it loads, without replicas.

    Args:
        rows: rows of this process: `process_rows`.
        batch: rows of all processes together.
        values: of `rows`, in their order.

    Returns:
        [replicas, batch, ...]: entry [:, r] has the observations of row r, one for each device that holds the row. A
        reduction over the first axis gives a value that is the same on all processes.
    """
    places = {row: number for number, row in enumerate(rows)}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        return values[[places[row] for row in range(*index[1].indices(batch))]][None]

    replicas = mesh.size // math.prod(mesh.shape[axis] for axis in ROWS)
    return jax.make_array_from_callback((replicas, batch, *values.shape[1:]), observation_sharding(mesh), block)


def row_owners(mesh: Mesh, batch: int) -> list[int]:
    """For each row of a global batch the one process, among those that load it, that acts for all of them.

    The rows of a set of processes are divided among the set.
    """
    holders: list[list[int]] = [[] for _ in range(batch)]
    for process in sorted({device.process_index for device in mesh.devices.flat}):
        for row in process_rows(mesh, batch, process):
            holders[row].append(process)
    return [processes[row % len(processes)] for row, processes in enumerate(holders)]

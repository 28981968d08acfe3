"""Values that processes observe independently, for rows that several processes load.

If mesh axes that replicate rows span processes, several processes load each row, and their observations may differ: one
process may read a record that another cannot. Such values must not become replicas of one array, which XLA assumes to
be equal. `observe` gives each device a separate slot. A reduction over the slots, in a jitted function, gives all
processes the same value. Host collectives would need the same order of calls in all threads of all processes; device
computations guarantee it.
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
    """The sharding of [replicas, rows, ...], with one slot per device of a row."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in mesh.axis_names if axis not in ROWS), ROWS))


def observe(
    mesh: Mesh, rows: Sequence[int], batch: int, values: Shaped[np.ndarray, "N ..."]
) -> Shaped[Array, "R B ..."]:
    """Build a global array of the observations of all processes, without replication.

    Args:
        rows: rows of this process (`process_rows`).
        batch: rows over all processes.
        values: observations of `rows`, in the same order.

    Returns:
        [replicas, batch, ...]: entry [:, r] has the observations of row r, one per device with the row. A reduction
        over the first axis gives the same value on all processes.
    """
    places = {row: number for number, row in enumerate(rows)}

    def block(index: tuple[slice, ...]) -> np.ndarray:
        return values[[places[row] for row in range(*index[1].indices(batch))]][None]

    replicas = mesh.size // math.prod(mesh.shape[axis] for axis in ROWS)
    return jax.make_array_from_callback((replicas, batch, *values.shape[1:]), observation_sharding(mesh), block)


def row_owners(mesh: Mesh, batch: int) -> list[int]:
    """Choose for each row of a global batch one of the processes that load it, which acts for all of them.

    The rows of a set of processes are distributed evenly over the set.
    """
    holders: list[list[int]] = [[] for _ in range(batch)]
    for process in sorted({device.process_index for device in mesh.devices.flat}):
        for row in process_rows(mesh, batch, process):
            holders[row].append(process)
    return [processes[row % len(processes)] for row, processes in enumerate(holders)]

"""Transfer batches from hosts to devices: the rows of each process, and prefetching to the mesh."""

import math
import queue
import threading
from collections import defaultdict
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.errors import InputError
from avocado_jax.parallel.mesh import ROWS

T = TypeVar("T")


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """The sharding of [rows, ...] arrays: rows over the data axes, replicated over the others."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in ROWS if axis in mesh.axis_names)))


def process_rows(mesh: Mesh, batch: int, process: int) -> list[int]:
    """The rows of a global batch that one process loads: the rows of its devices, in ascending order.

    The rows follow from the device order of the mesh. They need not be contiguous, and several processes may load
    the same rows. `jax.make_array_from_process_local_data` expects the rows in this order. The mesh may consist of
    devices of a topology description.

    Args:
        batch: rows over all processes.
        process: index of the process.

    Raises:
        InputError: the mesh does not divide the rows, the process has no device in the mesh, or two processes share
            some of their rows but not all.
    """
    parts = math.prod(mesh.shape[axis] for axis in ROWS if axis in mesh.axis_names)
    if batch % parts:
        raise InputError(f"batch: {batch} rows are not divided by data x fsdp = {parts}")
    rows: dict[int, set[int]] = defaultdict(set)
    for device, (part,) in rows_sharding(mesh).devices_indices_map((batch,)).items():
        rows[device.process_index].update(range(*part.indices(batch)))
    if process not in rows:
        raise InputError(f"mesh: process {process} has no device in it, so no rows to load")
    for other, other_rows in rows.items():
        if rows[process] != other_rows and rows[process] & other_rows:
            raise InputError(f"mesh: processes {process} and {other} share some of their rows but not all")
    return sorted(rows[process])


def prefetch_to_mesh(batches: Iterator[T], mesh: Mesh) -> Iterator[T]:
    """Transfer batches to the devices of the mesh, one batch ahead.

    Numpy arrays [rows of this process, ...] become global arrays, sharded by rows; other leaves are unchanged. A
    background thread prefetches one batch; at most two batches are on the devices. Exceptions of `batches` are raised
    in order.
    """
    sharding, stopped = rows_sharding(mesh), threading.Event()
    ready: queue.Queue = queue.Queue(maxsize=1)
    free = threading.Semaphore(1)

    def transfer(leaf: object) -> object:
        return jax.make_array_from_process_local_data(sharding, leaf) if isinstance(leaf, np.ndarray) else leaf

    def fill() -> None:
        try:
            while free.acquire() and not stopped.is_set():
                batch = next(batches, None)
                ready.put((None if batch is None else jax.tree.map(transfer, batch), None))
                if batch is None:
                    return
        except BaseException as error:  # raised again in the consumer's thread
            ready.put((None, error))

    thread = threading.Thread(target=fill, daemon=True)
    thread.start()
    try:
        while True:
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is None:
                return
            free.release()  # prefetch the next batch while the consumer uses this one
            yield batch
    finally:
        stopped.set()
        free.release()
        thread.join()
        if hasattr(batches, "close"):
            batches.close()

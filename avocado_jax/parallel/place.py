"""Host batches onto the mesh: each host puts its own rows, one batch ahead of the one in use."""

import queue
import threading
from collections.abc import Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.parallel.mesh import ROWS

T = TypeVar("T")


def rows_sharding(mesh: Mesh) -> NamedSharding:
    """Rows over the mesh's data axes, all else in one piece."""
    return NamedSharding(mesh, PartitionSpec(tuple(axis for axis in ROWS if axis in mesh.axis_names)))


def local_rows(mesh: Mesh, batch: int) -> range:
    """The rows of a global batch that this process's devices hold; processes that share a row all read it.

    Raises:
        ValueError: rows cannot be divided evenly, or this process's are not in one stretch.
    """
    parts = rows_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    held = sorted({row for (part,) in parts for row in range(*part.indices(batch))})
    rows = range(held[0], held[-1] + 1)
    if len(rows) != len(held):
        raise ValueError(f"process {jax.process_index()} holds rows {held}: order the mesh's devices by process")
    return rows


def place(batches: Iterator[T], mesh: Mesh) -> Iterator[T]:
    """The same batches with every numpy array on the mesh, where [rows, ...] is divided by rows.

    A thread makes and puts batch n + 1 while batch n is in use, and no more: two batches are on the devices.
    What `batches` raises is raised here, in its place.
    """
    sharding, ended = rows_sharding(mesh), threading.Event()
    ready: queue.Queue = queue.Queue(maxsize=1)
    free = threading.Semaphore(1)

    def put(leaf: object) -> object:
        return jax.make_array_from_process_local_data(sharding, leaf) if isinstance(leaf, np.ndarray) else leaf

    def fill() -> None:
        try:
            while free.acquire() and not ended.is_set():
                batch = next(batches, None)
                ready.put((None if batch is None else jax.tree.map(put, batch), None))
                if batch is None:
                    return
        except BaseException as error:  # handed over to the thread that uses the batches
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
            free.release()  # the next batch is begun as this one is handed out
            yield batch
    finally:
        ended.set()
        free.release()
        thread.join()
        if hasattr(batches, "close"):
            batches.close()

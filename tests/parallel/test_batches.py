"""Prefetching of host batches onto a mesh of simulated devices."""

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import pytest
from jax.sharding import AxisType

from avocado_jax.parallel.batches import prefetch_to_mesh


class Example(NamedTuple):
    """A batch as `prefetch_to_mesh` receives it: arrays, and leaves that stay on the host."""

    step: int
    ids: tuple[str, ...]
    x: np.ndarray
    flag: np.ndarray


def example(step):
    return Example(step, ("a", "b"), np.arange(8, dtype=np.float32).reshape(4, 2) + step, np.array([True, False] * 2))


@pytest.fixture(scope="module")
def mesh():
    return jax.make_mesh((1, 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=jax.devices()[:1])


def test_only_arrays_are_transferred(mesh):
    for step, batch in enumerate(prefetch_to_mesh(map(example, range(5)), mesh)):
        assert (batch.step, batch.ids) == (step, ("a", "b"))
        assert isinstance(batch.x, jax.Array)
        np.testing.assert_array_equal(batch.x, example(step).x)
        np.testing.assert_array_equal(batch.flag, example(step).flag)
    assert step == 4


def test_one_batch_is_prefetched(mesh):
    made = [threading.Event() for _ in range(5)]

    def batches():
        for step, event in enumerate(made):
            event.set()
            yield example(step)

    placed = prefetch_to_mesh(batches(), mesh)
    for step in range(3):
        assert next(placed).step == step
        assert made[step + 1].wait(60)  # prefetched while this one is in use
        assert not made[step + 2].wait(0.1)
    placed.close()


def test_errors_are_raised_in_order(mesh):
    closed = []

    def batches():
        try:
            yield example(0)
            raise ValueError("out of clips")
        finally:
            closed.append(True)

    placed = prefetch_to_mesh(batches(), mesh)
    assert next(placed).step == 0
    with pytest.raises(ValueError, match="out of clips"):
        next(placed)
    assert closed


def test_closing_early_closes_the_source(mesh):
    closed = []

    def batches():
        try:
            for step in range(100):
                yield example(step)
        finally:
            closed.append(True)

    placed = prefetch_to_mesh(batches(), mesh)
    next(placed)
    placed.close()
    assert closed


def test_rows_are_sharded_over_data_and_fsdp():
    """In a new process, since the number of devices is fixed when jax starts."""
    code = """
import jax, numpy as np
from jax.sharding import AxisType
from avocado_jax.parallel.batches import prefetch_to_mesh, process_rows
mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
assert process_rows(mesh, 8, 0) == list(range(8))
x = np.arange(16.0).reshape(8, 2)
(placed,) = prefetch_to_mesh(iter([(x,)]), mesh)
assert placed[0].shape == (8, 2) and len(placed[0].addressable_shards) == 8
rows = sorted(tuple(shard.data[:, 0].tolist()) for shard in placed[0].addressable_shards)
assert rows == sorted([(0.0, 2.0), (4.0, 6.0), (8.0, 10.0), (12.0, 14.0)] * 2), rows
print("good")
"""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert done.stdout == "good\n", done.stderr


PROCESS = """
import sys
sys.path[:0] = sys.argv[3:]
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType
from test_batches import example
from avocado_jax.parallel.batches import prefetch_to_mesh, process_rows
mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
rows = process_rows(mesh, 4, jax.process_index())
assert rows == [2 * jax.process_index(), 2 * jax.process_index() + 1], rows
mine = (example(step)._replace(x=example(step).x[rows], flag=example(step).flag[:2]) for step in range(3))
for step, batch in enumerate(prefetch_to_mesh(mine, mesh)):
    np.testing.assert_array_equal(multihost_utils.process_allgather(batch.x, tiled=True), example(step).x)
print("good", flush=True)
"""


def test_two_processes_load_their_rows():
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{reserved.getsockname()[1]}"
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-c", PROCESS, address]
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(Path(__file__).parent)], env=environment, stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [text.splitlines()[-1] for text in outputs] == ["good"] * 2

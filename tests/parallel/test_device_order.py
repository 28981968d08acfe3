"""Rows of each process for the device orders of TPU slices, and training where devices of processes interleave."""

import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from device_order import process_order
from jax._src import sharding_impls
from jax.sharding import Mesh
from processes import run_connected
from train_runs import CONFIG, write_checkpoint

from avocado_jax.config import GrpoConfig, load
from avocado_jax.errors import InputError
from avocado_jax.parallel.batches import process_rows, rows_sharding
from avocado_jax.parallel.mesh import AXES, make_mesh
from avocado_jax.planning.program import devices_of

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "launch"))

from plans import read_plans  # noqa: E402

SLICES = ("v6e:8x8", "v5p:4x4x4", "v5e:8x16", "v5e:8x8", "v6e:4x4", "v5e:4x4", "v5p:2x2x2", "v5p:2x2x4", "v6e:2x4")


def planned_configs():
    """(slice, config) of every plan."""
    for plan in read_plans():
        yield plan["topology"], load(str(ROOT / plan["config"]), plan["fields"])


class ShardingOfProcess:
    """A sharding from the view of one process: the attributes that jax reads to place process-local data."""

    is_fully_addressable = False

    def __init__(self, sharding, process):
        self.sharding, self.num_devices = sharding, sharding.num_devices
        self.is_fully_replicated = sharding.is_fully_replicated
        self.addressable_devices = [one for one in sharding.mesh.devices.flat if one.process_index == process]
        self.devices_indices_map, self.shard_shape = sharding.devices_indices_map, sharding.shard_shape

    def addressable_devices_indices_map(self, shape):
        return {device: self.devices_indices_map(shape)[device] for device in self.addressable_devices}


def assert_rows_of_processes(mesh, batch):
    """Each process has the rows of its devices, as many as jax expects; together they have all rows."""
    sharding, holders = rows_sharding(mesh), Counter()
    processes = {device.process_index for device in mesh.devices.flat}
    for process in processes:
        rows = process_rows(mesh, batch, process)
        mine = ShardingOfProcess(sharding, process)
        shards = [index[0] for index in mine.addressable_devices_indices_map((batch,)).values()]
        assert rows == sorted({row for shard in shards for row in range(batch)[shard]})
        assert len(rows) == sharding_impls.num_addressable_indices(mine, 0, (batch,))
        assert sharding_impls.local_to_global_shape(mine, (len(rows), 3)) == (batch, 3)
        holders.update(rows)
    assert sorted(holders) == list(range(batch))
    # The devices of a row are those of its position on data and fsdp; exactly their processes load it.
    parts = mesh.devices.reshape(-1, mesh.shape["tensor"])
    for row in range(batch):
        devices = parts[row * len(parts) // batch]
        assert holders[row] == len({device.process_index for device in devices})


@pytest.mark.parametrize("topology", SLICES)
def test_rows_of_every_config_on_a_slice(topology):
    """The meshes in plans.json that match the number of devices and the batch."""
    devices, checked = devices_of(topology), []
    for planned_for, config in planned_configs():
        sizes, rows = config.mesh, config.batch * (config.split if isinstance(config, GrpoConfig) else 1)
        if rows % (len(devices) // sizes.tensor):
            continue
        assert_rows_of_processes(make_mesh(sizes.data, sizes.fsdp, sizes.tensor, sizes.slices, devices), rows)
        checked.append(planned_for)
    assert checked
    assert checked.count(topology) == sum(planned_for == topology for planned_for, _ in planned_configs())


def test_rows_of_several_slices():
    devices = devices_of("v5e:4x4", 2)
    assert_rows_of_processes(make_mesh(1, -1, 2, 2, devices), 32)
    assert len({device.process_index for device in devices}) == 8


def test_rows_interleave_and_repeat():
    """Orders that cannot be expressed by a contiguous range of rows per process."""
    devices = devices_of("v5p:4x4x4")
    assert process_rows(make_mesh(1, 64, 1, 1, devices), 128, 0) == [0, 1, 8, 9, 32, 33, 40, 41]
    mesh = make_mesh(1, 16, 4, 1, devices)
    rows = [process_rows(mesh, 16, process) for process in range(16)]
    assert rows[0] == rows[1] == [0, 4]
    assert process_order("v5p:2x2x2") == [0, 1] * 4


def test_rows_that_no_process_can_load_are_refused():
    devices = np.array(devices_of("v5p:2x2x2"))

    def mesh(order):
        of = [[device for device in devices if device.process_index == process] for process in range(2)]
        return Mesh(np.array([of[process].pop() for process in order]).reshape(1, 4, -1), AXES)

    with pytest.raises(InputError, match="processes 1 and 0 share some of their rows but not all"):
        process_rows(mesh([0, 0, 0, 1, 1, 1, 1, 0]), 4, 1)
    with pytest.raises(InputError, match="process 2 has no device"):
        process_rows(mesh([0, 1] * 4), 4, 2)
    with pytest.raises(InputError, match="batch: 6 rows are not divided by data x fsdp = 4"):
        process_rows(mesh([0, 1] * 4), 6, 0)


PLACED = """
import json, sys
import numpy as np
from device_order import reorder, row_values
from avocado_jax.parallel.batches import prefetch_to_mesh, process_rows
from avocado_jax.parallel.mesh import AXES, make_mesh
for order, sizes in json.loads(sys.argv[1]):
    reorder(order)
    mesh = make_mesh(*sizes)
    rows = process_rows(mesh, 16, jax.process_index())
    (placed,) = prefetch_to_mesh(iter([np.array(rows)]), mesh)
    print(json.dumps({"rows": rows, "placed": row_values(mesh, placed)}))
"""


def test_two_processes_load_rows_of_any_pattern():
    """The global array has row r at r, whichever process loaded it."""
    sizes = [(1, 8, 1), (2, 4, 1), (1, 4, 2), (1, 2, 4), (1, 1, 8)]
    cases = [(process_order("v5p:2x2x2", *size), size) for size in sizes]
    cases += [([0, 1] * 4, (1, 4, 2)), ([0, 1, 1, 0, 0, 1, 1, 0], (1, 8, 1)), ([1] * 4 + [0] * 4, (1, 8, 1))]
    one, other = map(printed_json, run_connected(PLACED, 2, 4, json.dumps(cases), timeout=300, optimization=0))
    for case, mine, theirs in zip(cases, one, other, strict=True):
        assert mine["placed"] == theirs["placed"] == list(range(16)), case
        assert sorted({*mine["rows"], *theirs["rows"]}) == list(range(16)), case
    assert one[0]["rows"] == [0, 1, 4, 5, 8, 9, 12, 13]  # interleaved
    assert one[4]["rows"] == other[4]["rows"] == list(range(16))  # both processes load all rows
    assert one[7]["rows"] == list(range(8, 16))


def printed_json(output):
    """JSON objects that a program has printed. (gloo also prints lines.)"""
    return [json.loads(line) for line in output.splitlines() if line.startswith("{")]


TRAINED = """
import json, sys
from device_order import reorder, row_values
from avocado_jax.config import load
from avocado_jax.train.run import set_up, sft, stream

config, folder, order = sys.argv[1:4]
for name, order in (("contiguous", [0, 0, 1, 1]), ("interleaved", json.loads(order))):
    reorder(order)
    run = load(config, ["--steps", "2", "--batch", "4", "--data.heldout", ""])
    found = {}
    for split in (1, 2):
        setup = set_up(run, split)
        batch = next(stream(setup, run, 0))
        found[f"ids {split}"] = batch.ids  # of the rows that this process loads
        found[f"tokens {split}"] = row_values(setup.mesh, batch.captions.targets)
    found["status"] = sft(run, f"{folder}/{name}")
    print(json.dumps(found))
"""


@pytest.mark.slow
def test_interleaved_devices_give_the_same_loss_curve(tmp_path):
    """Two processes with their devices in the order of v5p:2x2x2, and in the order of processes."""
    order = process_order("v5p:2x2x2", each=2)
    write_checkpoint(tmp_path / "init")
    (tmp_path / "small.py").write_text(CONFIG.format(init=str(tmp_path / "init")))
    arguments = tmp_path / "small.py", tmp_path, json.dumps(order)
    found = list(map(printed_json, run_connected(TRAINED, 2, 2, *arguments, timeout=600, optimization=0)))
    for contiguous, interleaved in found:
        assert contiguous["status"] == interleaved["status"] == 0
        # the same captions at the same rows, whichever process loads them
        assert contiguous["tokens 1"] == interleaved["tokens 1"]
        assert (
            contiguous["tokens 2"] == interleaved["tokens 2"] == [row for row in contiguous["tokens 1"] for _ in "ab"]
        )
        assert len(set(map(str, contiguous["tokens 1"]))) == 4
    a, b, c, d = (name for one, _ in found for name in one["ids 1"])
    assert [one["ids 1"] for _, one in found] == [[a, c], [b, d]]
    assert [one["ids 2"] for _, one in found] == [[a, a, c, c], [b, b, d, d]]
    one, other = (loss_curve(tmp_path / name / "metrics.jsonl") for name in ("contiguous", "interleaved"))
    assert len(one) == 2
    for expected, line in zip(one, other, strict=True):
        assert line == pytest.approx(expected, rel=1e-4, abs=1e-6)


def loss_curve(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "perf"} for line in lines]

"""Device orders of TPU slices, and CPU devices in such an order."""

import jax
import numpy as np
from jax.experimental import mesh_utils

from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.planning.program import devices_of


def process_order(topology, data=1, fsdp=-1, tensor=1, each=None):
    """Process of each device of a TPU slice, in mesh order; only the first `each` devices of every process."""
    mesh = make_mesh(data, fsdp, tensor, devices=devices_of(topology))
    order, count = [], {}
    for device in mesh.devices.flat:
        process = device.process_index
        count[process] = count.get(process, 0) + 1
        if each is None or count[process] <= each:
            order.append(process)
    return order


def reorder(order):
    """Patch mesh creation so that the processes of consecutive devices are `order`."""

    def create_device_mesh(sizes, devices, **_):
        left = {process: [device for device in devices if device.process_index == process] for process in set(order)}
        assert sorted(order) == sorted(device.process_index for device in devices), "another number of devices"
        return np.array([left[process].pop(0) for process in order]).reshape(sizes)

    mesh_utils.create_device_mesh = create_device_mesh


def row_values(mesh, values):
    """Values [rows] of a global array by global row, on every process."""
    with jax.set_mesh(mesh):
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        return np.asarray(jax.jit(lambda x: x, out_shardings=whole)(values)).tolist()

"""The device mesh, and constraints on activations.

Axes: `data` (copies of the parameters), `fsdp` (parts of the parameters, gathered where they are used) and `tensor`
(parts of heads, hidden widths and the vocabulary). Rows are divided over data and fsdp.
"""

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from avocado_jax.errors import InputError
from avocado_jax.typing import Array

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # axes that rows are divided over


def make_mesh(data: int, fsdp: int, tensor: int, slices: int = 1, devices: list | None = None) -> Mesh:
    """The mesh of these sizes over all devices (or `devices`); one size may be -1, for all that are left.

    With several `slices`, copies over slices talk through the data-center network and all else inside a slice:
    `data` is then `slices` times as long.

    Raises:
        InputError: the sizes do not use up the devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or min(data, fsdp, tensor) < -1 or 0 in sizes or slices < 1:
        raise InputError(f"mesh: {sizes} with {slices} slices: sizes are positive, and one of them may be -1")
    known = int(np.prod([size for size in sizes if size > 0])) * slices
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) * slices != len(devices):
        told = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
        raise InputError(f"mesh: {told}{f' x slices {slices}' if slices > 1 else ''} is not {len(devices)} devices")
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1), devices, allow_split_physical_axes=True)
    elif devices[0].platform == "cpu":
        grid = np.array(devices).reshape(sizes)  # in the order of processes: each holds one stretch of rows
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def parts_of(axis: str | tuple[str, ...]) -> int:
    """How many parts an axis ("rows": data and fsdp together) makes on the mesh in use; 1 where there is none."""
    mesh = jax.sharding.get_abstract_mesh()
    names = ROWS if axis == "rows" else (axis,) if isinstance(axis, str) else axis
    return 1 if mesh.empty else int(np.prod([mesh.shape[name] for name in names]))


def constrain(x: Array, *axes: str | None) -> Array:
    """Divide an activation over mesh axes, one entry a leading dimension; those not named stay whole.

    Holds inside `jax.set_mesh`; without a mesh there is nothing to divide. Dimensions that an axis does not divide
    evenly stay whole too.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    parts = [axis if axis and size % parts_of(axis) == 0 else None for axis, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(ROWS if axis == "rows" else axis for axis in parts)))

"""The device mesh, and sharding constraints on activations.

Axes: `data` (replicas of the parameters), `fsdp` (parameter shards, gathered where they are used) and `tensor` (shards
of heads, hidden widths and the vocabulary). Rows are sharded over data and fsdp. The device order is the one that
`mesh_utils` chooses for the interconnect: consecutive devices of the mesh may belong to different processes.
"""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, PartitionSpec

from avocado_jax.errors import InputError
from avocado_jax.typing import Array

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # axes that rows are sharded over


def make_mesh(data: int, fsdp: int, tensor: int, slices: int = 1, devices: list | None = None) -> Mesh:
    """Create a mesh of these sizes over `devices`, by default all; one size may be -1 to take the remaining devices.

    With several `slices`, the `data` axis has `slices` x `data` entries: replicas in different slices communicate
    over the data-center network, everything else over the interconnect of one slice.

    Raises:
        InputError: the sizes do not match the number of devices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [data, fsdp, tensor]
    if sizes.count(-1) > 1 or min(data, fsdp, tensor) < -1 or 0 in sizes or slices < 1:
        raise InputError(f"mesh: {sizes} with {slices} slices: sizes are positive, and one of them may be -1")
    known = int(np.prod([size for size in sizes if size > 0])) * slices
    if -1 in sizes:
        sizes[sizes.index(-1)] = max(1, len(devices) // known)
    if int(np.prod(sizes)) * slices != len(devices):
        product = " x ".join(f"{name} {size}" for name, size in zip(AXES, sizes))
        raise InputError(f"mesh: {product}{f' x slices {slices}' if slices > 1 else ''} is not {len(devices)} devices")
    if slices > 1:
        grid = mesh_utils.create_hybrid_device_mesh(sizes, (slices, 1, 1), devices, allow_split_physical_axes=True)
    else:
        grid = mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def with_tensor(mesh: Mesh, tensor: int) -> Mesh:
    """The same devices in the same order with a larger `tensor` axis and a smaller `fsdp` axis.

    Raises:
        InputError: `tensor` is not a multiple of the present size, or `fsdp` cannot be divided accordingly.
    """
    data, fsdp, present = mesh.devices.shape
    if tensor % present or fsdp % (tensor // present):
        raise InputError(
            f"mesh.rollout_tensor: {tensor} is not a multiple of tensor = {present} that divides fsdp x tensor = "
            f"{fsdp * present}"
        )
    return Mesh(mesh.devices.reshape(data, -1, tensor), AXES, axis_types=mesh.axis_types)


def parse_mesh(text: str | None) -> tuple[int, int] | None:
    """(data, tensor) of --mesh DATA,TENSOR; None of None.

    Raises:
        InputError: it is not of this form.
    """
    if text is None:
        return None
    data, _, tensor = text.partition(",")
    if data.isdecimal() and tensor.isdecimal() and int(data) > 0 and int(tensor) > 0:
        return int(data), int(tensor)
    raise InputError(f"--mesh {text}: not DATA,TENSOR with two positive numbers")


def parts_of(axis: str | tuple[str, ...]) -> int:
    """Number of shards of an axis ("rows": data and fsdp) of the current mesh; 1 without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    names = ROWS if axis == "rows" else (axis,) if isinstance(axis, str) else axis
    return 1 if mesh.empty else int(np.prod([mesh.shape[name] for name in names]))


def traced_on_mesh(run: Callable) -> Callable:
    """Inside jit, trace `run` with its argument `mesh` as the current mesh, and with its arrays on it.

    JAX does not combine arrays of different meshes, even of the same devices in the same order. The arrays keep their
    layouts. A no-op if `mesh` is None or already current.
    """
    signature = inspect.signature(run)

    @wraps(run)
    def traced(*args: Any, **options: Any) -> Any:
        given = signature.bind(*args, **options)
        if (mesh := given.arguments["mesh"]) is None:
            return run(*args, **options)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return run(*on_current_mesh(given.args), **on_current_mesh(given.kwargs))

    return traced


def on_current_mesh(tree: Any) -> Any:
    """The arrays of a tree with the same layouts as arrays of the current mesh; other leaves are unchanged."""
    mesh = jax.sharding.get_abstract_mesh()

    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or (of := jax.typeof(leaf).sharding.mesh).empty or of == mesh:
            return leaf
        return jax.lax.with_sharding_constraint(leaf, PartitionSpec(*[PartitionSpec.UNCONSTRAINED] * leaf.ndim))

    return jax.tree.map(convert, tree)


def constrain(x: Array, *axes: str | None) -> Array:
    """Constrain the sharding of an activation: one mesh axis, "rows" or None for each leading dimension.

    Remaining dimensions, and those that their axis does not divide evenly, are replicated. A no-op outside of
    `jax.set_mesh`.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    parts = [axis if axis and size % parts_of(axis) == 0 else None for axis, size in zip(axes, x.shape, strict=False)]
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*(ROWS if axis == "rows" else axis for axis in parts)))

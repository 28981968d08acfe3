"""The mesh of the sampler: the devices of the training mesh, in the same order."""

import jax
import pytest

from avocado_jax.errors import InputError
from avocado_jax.parallel.mesh import make_mesh, with_tensor


def test_a_larger_tensor_axis_takes_from_fsdp():
    mesh = make_mesh(2, 2, 2, devices=jax.devices()[:8])
    sampler = with_tensor(mesh, 4)
    assert dict(sampler.shape) == {"data": 2, "fsdp": 1, "tensor": 4}
    assert list(sampler.devices.flat) == list(mesh.devices.flat)
    assert sampler.devices[1].tolist() == [mesh.devices[1].ravel().tolist()]  # replicas keep their devices
    assert with_tensor(mesh, 2) == mesh


@pytest.mark.parametrize("tensor", [1, 3, 8])
def test_a_size_that_does_not_divide_the_devices_is_refused(tensor):
    message = f"mesh.rollout_tensor: {tensor} is not a multiple of tensor = 2 that divides fsdp x tensor = 4"
    with pytest.raises(InputError, match=message):
        with_tensor(make_mesh(2, 2, 2, devices=jax.devices()[:8]), tensor)

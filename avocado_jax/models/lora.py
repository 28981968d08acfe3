"""Low-rank adapters: y = x W + (alpha / rank) (x A) B in the language model's linear maps (Hu et al., 2021).

A and B are the parameters `lora_a` and `lora_b` next to `kernel`. B is initialised to zero, so that a new adapter is a
no-op.
"""

from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.models.config import Lora
from avocado_jax.typing import Array, Float


def init_a(key: Array, shape: tuple[int, ...], dtype: Any) -> Array:
    """Initialise A of a layer or a stack: uniform in +-1 / sqrt(inputs), as in the reference implementations."""
    bound = shape[-2] ** -0.5
    return jax.random.uniform(key, shape, dtype, -bound, bound)


class TextDense(nn.Module):
    """`nn.Dense` with a low-rank adapter, an int8 kernel, or both."""

    features: int
    use_bias: bool
    dtype: str
    param_dtype: str
    lora: Lora | None
    int8: bool

    @nn.compact
    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... F"]:
        def param(name: str, init: Callable, *shape: int) -> Array:
            return self.param(name, init, shape, jnp.dtype(self.param_dtype)).astype(self.dtype)

        x = x.astype(self.dtype)
        kernel = param("kernel", nn.initializers.lecun_normal(), x.shape[-1], self.features)
        y = x @ kernel
        if self.int8:
            y = y * jax.lax.broadcast_to_rank(param("kernel_scale", nn.initializers.ones, self.features), y.ndim)
        if self.use_bias:
            y = y + jax.lax.broadcast_to_rank(param("bias", nn.initializers.zeros, self.features), y.ndim)
        if self.lora is None:
            return y
        a = param("lora_a", init_a, x.shape[-1], self.lora.rank)
        b = param("lora_b", nn.initializers.zeros, self.lora.rank, self.features)
        return y + self.lora.scale * ((x @ a) @ b)


def update_of(a: Array, b: Array, lora: Lora) -> Array:
    """The update of a kernel by its adapter, (alpha / rank) A B, in fp32. Leading axes are stacked layers."""
    return lora.scale * (a.astype("float32") @ b.astype("float32"))


def add_adapters(params: Mapping[str, Any], like: Any, seed: int) -> dict[str, Any]:
    """Add newly initialised, sharded adapters to parameters.

    Args:
        params: arrays of all parameters except adapters.
        like: the complete tree of ShapeDtypeStructs with shardings.
        seed: seed of the initialisation; the result does not depend on processes and mesh.
    """
    flat, wanted = flatten_dict(params), flatten_dict(like)
    missing = sorted(path for path in wanted if path not in flat)

    def make(key: Array) -> list[Array]:
        keys = jax.random.split(key, max(1, len(missing)))
        init = {"lora_a": init_a, "lora_b": nn.initializers.zeros}
        return [init[path[-1]](key, wanted[path].shape, wanted[path].dtype) for path, key in zip(missing, keys)]

    made = jax.jit(make, out_shardings=[wanted[path].sharding for path in missing])(jax.random.key(seed))
    return unflatten_dict(flat | dict(zip(missing, made)))

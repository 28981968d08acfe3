"""Decoding weights: a copy of training parameters in the dtype and layout that decoding reads fastest."""

from collections.abc import Mapping
from functools import partial
from operator import itemgetter
from typing import Any

import jax
from jax.sharding import Mesh

from avocado_jax.models.int8 import quantized
from avocado_jax.parallel.rules import shardings


@partial(jax.jit, static_argnames=("dtype", "mesh", "axes", "encoders", "int8"))
def decoding_weights(
    params: Any,
    dtype: str,
    mesh: Mesh | None = None,
    axes: tuple[str, ...] = ("fsdp", "tensor"),
    encoders: bool = True,
    int8: bool = False,
) -> Any:
    """Parameters of `computed(model, dtype, scan=False)`: cast and unstacked.

    Low-rank adapters stay beside their kernels. Merged into a kernel in bf16, most of a small update would be rounded
    away, and the sampler would not be the policy that is trained.

    Args:
        params: stacked parameters, as trained.
        dtype: of the copy.
        mesh: the mesh of `params`; None on a single device.
        axes: the mesh axes that the copy is sharded over; it is replicated over the others.
        encoders: whether to keep the encoders; not needed if clips come encoded.
        int8: whether the kernels of the language model's layers are int8, as in a model with `text.int8`.
    """
    if not encoders:
        params = params | {"vision": {"merger": params["vision"]["merger"]}, "audio": {"proj": params["audio"]["proj"]}}
    params = quantized(params, dtype) if int8 else params
    weights = jax.tree.map(lambda leaf: leaf if leaf.dtype == "int8" else leaf.astype(dtype), unstacked(params))
    return jax.lax.with_sharding_constraint(weights, shardings(weights, mesh, over=axes)) if mesh else weights


def unstacked(params: Mapping[str, Any]) -> dict[str, Any]:
    """Stacked parameters with separate layers: `layers` becomes `layers_0`, `layers_1`, ..."""
    separate: dict[str, Any] = {}
    for name, part in params.items():
        if name == "layers":
            for layer in range(len(jax.tree.leaves(part)[0])):
                separate[f"layers_{layer}"] = jax.tree.map(itemgetter(layer), part)
        else:
            separate[name] = unstacked(part) if isinstance(part, Mapping) else part
    return separate

"""Weight-only int8: kernels of the language model's layers in int8, with a scale for each output channel.

A decoding step reads all weights, and its time is that of reading them. The largest magnitude of a channel becomes 127.
Products are computed in the dtype of the activations. Embedding, output matrix, norms, biases and adapters keep theirs.
"""

from typing import Any

import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict


def quantized(params: Any, dtype: str) -> Any:
    """Parameters with int8 kernels, for a model with `text.int8`.

    Args:
        params: of the model without it; kernels are [..., inputs, outputs].
        dtype: of the scales. They are rounded to it before the kernels are divided by them.
    """
    flat = flatten_dict(params)
    for path, kernel in tuple(flat.items()):
        if path[0] == "text" and path[-1] == "kernel":
            kernel = kernel.astype(jnp.float32)
            scale = (jnp.maximum(jnp.max(jnp.abs(kernel), axis=-2), 1e-12) / 127).astype(dtype)
            levels = jnp.round(kernel / scale[..., None, :].astype(jnp.float32))
            flat[path] = jnp.clip(levels, -127, 127).astype(jnp.int8)
            flat[(*path[:-1], "kernel_scale")] = scale
    return unflatten_dict(flat)

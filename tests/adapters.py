"""Merge low-rank adapters into their kernels, for comparison."""

from flax.traverse_util import flatten_dict, unflatten_dict


def merge(params, scale):
    """Equivalent parameters without adapters, in fp32."""
    flat = flatten_dict(params)
    for path in [path for path in flat if path[-1] == "lora_a"]:
        a, b = flat.pop(path), flat.pop((*path[:-1], "lora_b"))
        flat[*path[:-1], "kernel"] = flat[*path[:-1], "kernel"] + scale * (a @ b)
    return unflatten_dict(flat)

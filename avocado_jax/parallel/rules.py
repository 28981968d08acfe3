"""Sharding rules: the table of parameter paths and PartitionSpecs for training, rollout, checkpoints and conversion.

Large matrices are sharded over `tensor` along one dimension and over `fsdp` along the other. A dimension that is not
divisible by the size of its mesh axis is replicated, so that small models run on any mesh.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

COLUMN = PartitionSpec("fsdp", "tensor")  # [input, output], column-parallel: q, k, v, gate, up
ROW = PartitionSpec("tensor", "fsdp")  # [input, output], row-parallel: out, down
REPLICATED = PartitionSpec()

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(q|k|v|gate|up)/kernel", COLUMN),
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(out|down)/kernel", ROW),
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(q|k|v|gate|up)/bias", PartitionSpec("tensor")),
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(out|down)/bias", REPLICATED),
    (r"(text|vision|audio)/layers(_\d+)?/\w+_norm/(scale|bias)", REPLICATED),
    (r"text/layers(_\d+)?/(mlp/)?(q|k|v|gate|up)/kernel_scale", PartitionSpec("tensor")),  # [output]
    (r"text/layers(_\d+)?/(mlp/)?(out|down)/kernel_scale", REPLICATED),
    (r"text/layers(_\d+)?/(mlp/)?\w+/lora_a", PartitionSpec("fsdp", None)),  # [input, rank]
    (r"text/layers(_\d+)?/(mlp/)?(q|k|v|gate|up)/lora_b", PartitionSpec(None, "tensor")),  # [rank, output]
    (r"text/layers(_\d+)?/(mlp/)?(out|down)/lora_b", PartitionSpec(None, "fsdp")),
    (r"(text|audio|vision/merger)/norm/(scale|bias)", REPLICATED),
    (r"embedding|head", PartitionSpec("tensor", "fsdp")),  # [vocabulary, width]
    (r"vision/patch/kernel|audio/proj/kernel", PartitionSpec(None, "fsdp")),
    (r"vision/merger/up/kernel", COLUMN),
    (r"vision/merger/up/bias", PartitionSpec("tensor")),
    (r"vision/merger/out/kernel", ROW),
    (r"vision/merger/out/bias|audio/proj/bias", REPLICATED),
    (r"audio/conv\d/kernel", PartitionSpec(None, None, "fsdp")),  # [taps, input, output]
    (r"audio/conv\d/bias", REPLICATED),
)


def path_of(keys: tuple) -> str:
    """The path of a parameter in the format of the rules: `text/layers/mlp/up/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def spec_of(path: str) -> PartitionSpec:
    """The rule of a parameter's path. The leading layer axis of stacked layers is never sharded.

    Raises:
        ValueError: no rule, or more than one, matches the path.
    """
    found = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(f"{path} matches {len(found)} rules of parallel/rules.py instead of one")
    return PartitionSpec(None, *found[0]) if "/layers/" in path else found[0]


def shardings(tree: Any, mesh: Mesh, over: tuple[str, ...] = ("fsdp", "tensor")) -> Any:
    """NamedShardings of a tree of parameters or shapes, using only the mesh axes in `over`."""

    def sharding_of(keys: tuple, leaf: Any) -> NamedSharding:
        spec = spec_of(path_of(keys))
        spec = [*spec, *[None] * (len(leaf.shape) - len(spec))]
        spec = [axis if axis in over else None for axis in spec]
        parts = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, leaf.shape)]
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree_util.tree_map_with_path(sharding_of, tree)


def bytes_per_device(tree: Any) -> int:
    """The bytes per device of a tree of arrays or shapes with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )

"""One table: parameter paths to PartitionSpecs. Training, rollout, checkpoints and conversion all read it.

Large matrices are divided over `fsdp` along the side that `tensor` does not take, so that each is stored in parts
on every chip of both axes. A dimension that an axis does not divide evenly stays whole: small models run on any mesh.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

IN = PartitionSpec("fsdp", "tensor")  # [input, output], outputs divided: q, k, v, gate, up
OUT = PartitionSpec("tensor", "fsdp")  # [input, output], inputs divided: out, down
WHOLE = PartitionSpec()

RULES: tuple[tuple[str, PartitionSpec], ...] = (
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(q|k|v|gate|up)/kernel", IN),
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(out|down)/kernel", OUT),
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(q|k|v|gate|up)/bias", PartitionSpec("tensor")),
    (r"(text|vision|audio)/layers(_\d+)?/(mlp/)?(out|down)/bias", WHOLE),
    (r"(text|vision|audio)/layers(_\d+)?/\w+_norm/(scale|bias)", WHOLE),
    (r"text/layers(_\d+)?/(mlp/)?\w+/lora_a", PartitionSpec("fsdp", None)),  # [input, rank]
    (r"text/layers(_\d+)?/(mlp/)?(q|k|v|gate|up)/lora_b", PartitionSpec(None, "tensor")),  # [rank, output]
    (r"text/layers(_\d+)?/(mlp/)?(out|down)/lora_b", PartitionSpec(None, "fsdp")),
    (r"(text|audio|vision/merger)/norm/(scale|bias)", WHOLE),
    (r"embedding|head", PartitionSpec("tensor", "fsdp")),  # [vocabulary, width]
    (r"vision/patch/kernel|audio/proj/kernel", PartitionSpec(None, "fsdp")),
    (r"vision/merger/up/kernel", IN),
    (r"vision/merger/up/bias", PartitionSpec("tensor")),
    (r"vision/merger/out/kernel", OUT),
    (r"vision/merger/out/bias|audio/proj/bias", WHOLE),
    (r"audio/conv\d/kernel", PartitionSpec(None, None, "fsdp")),  # [taps, input, output]
    (r"audio/conv\d/bias", WHOLE),
)


def path_of(keys: tuple) -> str:
    """A parameter's path, as the rules spell it: `text/layers/mlp/up/kernel`."""
    return jax.tree_util.keystr(keys, simple=True, separator="/")


def spec_of(path: str) -> PartitionSpec:
    """The one rule of a parameter's path; a stack's leading axis of layers is never divided.

    Raises:
        ValueError: no rule matches it, or more than one.
    """
    found = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(found) != 1:
        raise ValueError(f"{path} matches {len(found)} rules of parallel/rules.py instead of one")
    return PartitionSpec(None, *found[0]) if "/layers/" in path else found[0]


def shardings(tree: Any, mesh: Mesh, over: tuple[str, ...] = ("fsdp", "tensor")) -> Any:
    """A NamedSharding for every leaf of a tree of parameters (or of their shapes), divided over these axes only."""

    def of(keys: tuple, leaf: Any) -> NamedSharding:
        spec = spec_of(path_of(keys))
        spec = [*spec, *[None] * (len(leaf.shape) - len(spec))]
        spec = [axis if axis in over else None for axis in spec]
        parts = [axis if axis and size % mesh.shape[axis] == 0 else None for axis, size in zip(spec, leaf.shape)]
        return NamedSharding(mesh, PartitionSpec(*parts))

    return jax.tree_util.tree_map_with_path(of, tree)


def bytes_per_device(tree: Any) -> int:
    """Bytes of one device's part of a tree of arrays (or shapes) with shardings."""
    return sum(
        int(np.prod(leaf.sharding.shard_shape(leaf.shape))) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
    )

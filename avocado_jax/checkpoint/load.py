"""Load parameters from Hugging Face or run folders to devices: unsharded for decoding, or sharded over a mesh."""

import hashlib
import itertools
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from avocado_jax.checkpoint.hf import Entry, HfCheckpoint, is_hf, open_hf, read_json, without_towers
from avocado_jax.checkpoint.hf_config import TEXT_MODEL
from avocado_jax.checkpoint.orbax import RunCheckpoint, open_run
from avocado_jax.checkpoint.references import is_remote, is_run, located, run_path
from avocado_jax.data import storage
from avocado_jax.data.ordered import map_ordered
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

MEMORY = 2**30  # bytes of prefetched tensors
SHIPPED = Path(__file__).parents[1] / "assets" / "captioner"
Checkpoint = HfCheckpoint | RunCheckpoint  # both read one parameter or layer at a time


def open_checkpoint(reference: str | os.PathLike, copies: bool = False) -> Checkpoint:
    """Open a model reference (references.py): a folder in Hugging Face format, or a run at its newest finished step.

    Args:
        copies: also download side files that are only copied.

    Raises:
        InputError: the reference is not a checkpoint, or an invalid one.
        StorageError: storage failed, or the hub cannot be reached.
    """
    folder = located(reference, "copies" if copies else "model")
    if is_run(folder):
        return open_run(folder, copies=copies)
    if is_hf(folder):
        return open_hf(folder, copies=copies)
    run, _, step = folder.rstrip("/").rpartition("/checkpoints")
    if run and step.strip("/").isdigit() | (not step) and is_run(run):
        raise InputError(f"{folder}: part of a run; name the run, {run}, whose newest checkpoint is read")
    if not storage.is_remote(folder) and not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder, and not ORG/NAME of the Hugging Face hub")
    raise InputError(f"{folder}: neither a checkpoint in Hugging Face format nor a run folder")


def open_language_model(reference: str | os.PathLike) -> Checkpoint:
    """Open the language model of a reference: a thinker without its encoders, or a text model (Qwen2).

    Raises:
        InputError, StorageError: see `open_checkpoint`.
    """
    folder = located(reference)
    if not is_run(folder) and is_hf(folder):
        fields = read_json(run_path(folder) / "config.json")
        if isinstance(fields, dict) and fields.get("model_type") == TEXT_MODEL:
            return open_hf(folder, text_only=True)
    checkpoint = open_checkpoint(folder)
    return checkpoint._replace(entries=without_towers(checkpoint.entries))


def shipped_checkpoint() -> Path:
    """The folder of the small captioner that is shipped with this package.

    Raises:
        InputError: this copy of the package has no captioner.
    """
    if not is_hf(SHIPPED):
        raise InputError("no checkpoint comes with this copy of the package: name one with --checkpoint REF")
    return SHIPPED


def named_checkpoint(given: str | None) -> Checkpoint:
    """Open the checkpoint of a reference, or the shipped one.

    Raises:
        InputError: see `open_checkpoint` and `shipped_checkpoint`.
    """
    return open_checkpoint(given or shipped_checkpoint())


def identity(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's content, independent of its location."""
    digest = hashlib.sha256()
    if isinstance(checkpoint, RunCheckpoint):  # Orbax uses random file names, so that names identify the content
        names = sorted(f"/{file.name}" for file in storage.listing(str(checkpoint.params)))
        digest.update("\n".join(names).encode())
    files = [path for path in checkpoint.config_folder.iterdir() if path.suffix in (".json", ".safetensors")]
    for path in progress(sorted(files), "reading the checkpoint's identity"):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    if isinstance(checkpoint, HfCheckpoint) and is_remote(checkpoint.folder):  # use the checksums of the service
        for path in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
            digest.update(f"{path.name} {storage.fingerprint(str(path))}".encode())
    return digest.hexdigest()


def load_params(checkpoint: Checkpoint, dtype: str, shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Load all parameters in `dtype`, with separate layers (`ThinkerConfig.scan` false).

    Args:
        shardings: tree of shardings; None: load to the default device.
    """
    params: dict[str, Any] = {}
    places = flatten_dict(shardings or {})
    entries = list(checkpoint.entries.values())
    values = map_ordered(lambda entry: checkpoint.read(entry).astype(jnp.dtype(dtype)), entries, _nbytes, MEMORY)
    for value, entry in progress(zip(values, entries), "loading tensors", len(entries)):
        node = params
        path = tuple(key if key != "layers" else f"layers_{entry.layer}" for key in entry.path)
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = jax.device_put(value, places.get(path))
    return params


def load_sharded(checkpoint: Checkpoint, like: Mapping[str, Any], whole: bool = True) -> dict[str, Any]:
    """Load stacked parameters, created sharded. Each process reads only the shards of its devices, once.

    Host memory contains the local shards of one leaf, and `MEMORY` bytes of prefetched layers.

    Args:
        like: tree of ShapeDtypeStructs with shardings and the requested dtypes.
        whole: check that the checkpoint has no other parameters.

    Returns:
        The tree of arrays, without adapters (`lora_a`, `lora_b`), which are merged when a checkpoint is read.

    Raises:
        InputError: the checkpoint is of another model, or its files are damaged.
    """
    stacks: dict[tuple[str, ...], list[Entry]] = {}
    for entry in checkpoint.entries.values():
        stacks.setdefault(entry.path, []).append(entry)
    wanted = {path: leaf for path, leaf in flatten_dict(like).items() if not path[-1].startswith("lora_")}
    if differ := sorted(stacks.keys() ^ wanted.keys() if whole else wanted.keys() - stacks.keys()):
        raise InputError(f"{checkpoint.folder}: of another model, which differs in {'/'.join(differ[0])}")
    by_range = isinstance(checkpoint, HfCheckpoint) and is_remote(checkpoint.folder) and jax.process_count() > 1
    layouts = {path: _by_rows(stacks[path][0], leaf) if by_range else leaf for path, leaf in wanted.items()}
    boxes = {path: _boxes(leaf) for path, leaf in layouts.items()}
    reads = [
        _Read(entry, box[int(entry.layer is not None) :], layouts[path].dtype)
        for path in wanted
        for entry in stacks[path]
        for box in boxes[path]
    ]
    values = map_ordered(lambda read: read.values(checkpoint), reads, _Read.nbytes, MEMORY)
    leaves = {}
    for path, leaf in progress(list(layouts.items()), "loading parameters"):
        array = _assemble(leaf, boxes[path], stacks[path], values)
        sharding = wanted[path].sharding
        leaves[path] = array if leaf is wanted[path] else jax.jit(_identity, out_shardings=sharding)(array)
    return unflatten_dict(leaves)


Block = tuple[tuple[int, int], ...]  # (begin, end) of each axis


class _Read(NamedTuple):
    """A block of an entry, in our layout, that this process reads."""

    entry: Entry
    block: Block
    dtype: np.dtype

    def values(self, checkpoint: Checkpoint) -> np.ndarray:
        value = checkpoint.read_part(self.entry, tuple(slice(*axis) for axis in self.block))
        return value.astype(self.dtype, copy=False)

    def nbytes(self) -> int:
        return 4 * _size(self.block)


def _nbytes(entry: Entry) -> int:
    """An upper bound of the bytes of an entry: four per value."""
    return 4 * math.prod(entry.shape)


def _by_rows(entry: Entry, like: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
    """The sharding with which several processes read a leaf from a bucket.

    Byte ranges of a file are complete rows of a tensor. So the rows are sharded over all mesh axes of the leaf, and the
    devices reshard afterwards. Otherwise each process would read almost all of a leaf with sharded columns.
    """
    mesh, axis = like.sharding.mesh, entry.change.rows + (entry.layer is not None)
    over = tuple(
        name for names in like.sharding.spec for name in (names if isinstance(names, tuple) else [names]) if name
    )
    if not over or like.shape[axis] % math.prod(mesh.shape[name] for name in over):
        return like
    spec = PartitionSpec(*[over if number == axis else None for number in range(len(like.shape))])
    return jax.ShapeDtypeStruct(like.shape, like.dtype, sharding=NamedSharding(mesh, spec))


def _identity(array: jax.Array) -> jax.Array:
    return array


def _local_blocks(like: jax.ShapeDtypeStruct) -> dict[jax.Device, Block]:
    """The block of a leaf for each device of this process."""
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    return {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, like.shape))
        for device, index in indices.items()
    }


def _boxes(like: jax.ShapeDtypeStruct) -> list[Block]:
    """The blocks of a leaf that this process reads: their bounding box if they fill it, otherwise each block."""
    blocks = list(dict.fromkeys(_local_blocks(like).values()))
    around = tuple((min(begin for begin, _ in axis), max(end for _, end in axis)) for axis in zip(*blocks))
    return [around] if _size(around) == sum(map(_size, blocks)) else blocks


def _size(block: Block) -> int:
    return math.prod(end - begin for begin, end in block)


def _assemble(
    like: jax.ShapeDtypeStruct, boxes: Sequence[Block], entries: Sequence[Entry], values: Iterator[np.ndarray]
) -> jax.Array:
    """Assemble a parameter, with all layers if stacked, from the values of its entries and boxes."""
    stacked = int(entries[0].layer is not None)
    blocks = _local_blocks(like)
    parts = {block: np.empty([end - begin for begin, end in block], like.dtype) for block in blocks.values()}
    for entry, box in itertools.product(entries, boxes):
        value = next(values)
        for block, part in parts.items():
            if all(low <= begin and end <= high for (begin, end), (low, high) in zip(block, box)):
                slices = tuple(slice(begin - low, end - low) for (begin, end), (low, _) in zip(block, box))
                (part[entry.layer] if stacked else part)[...] = value[slices[stacked:]]
    arrays = [jax.device_put(parts[block], device) for device, block in blocks.items()]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays))

"""Parameters onto devices, from either kind of folder: whole for decoding, or in parts over a mesh."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.checkpoint.hf import Entry, HfCheckpoint, is_hf, open_hf, read_json, without_towers
from avocado_jax.checkpoint.hf_config import TEXT_MODEL
from avocado_jax.checkpoint.orbax import RunCheckpoint, open_run
from avocado_jax.checkpoint.references import is_remote, is_run, located, run_path
from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

READERS = 4  # tensors that are read at once
SHIPPED = Path(__file__).parents[1] / "assets" / "captioner"
Checkpoint = HfCheckpoint | RunCheckpoint  # both read one parameter, or one layer of it, at a time


def open_checkpoint(reference: str | os.PathLike) -> Checkpoint:
    """Open a model reference (references.py): a folder in Hugging Face format, or a run at its newest finished step.

    Raises:
        InputError: neither, or not sound.
        StorageError: storage failed, or the hub cannot be reached.
    """
    folder = located(reference)
    if is_run(folder):
        return open_run(folder)
    if is_hf(folder):
        return open_hf(folder)
    if not storage.is_remote(folder) and not Path(folder).is_dir():
        raise InputError(f"{folder}: no such folder")
    raise InputError(f"{folder}: neither a checkpoint in Hugging Face format nor a run folder")


def open_language_model(reference: str | os.PathLike) -> Checkpoint:
    """The language model of a reference: that of a thinker, its towers left out, or a text model (Qwen2).

    Raises:
        InputError, StorageError: as `open_checkpoint`.
    """
    folder = located(reference)
    if not is_run(folder) and is_hf(folder):
        fields = read_json(run_path(folder) / "config.json")
        if isinstance(fields, dict) and fields.get("model_type") == TEXT_MODEL:
            return open_hf(folder, text_only=True)
    checkpoint = open_checkpoint(folder)
    return checkpoint._replace(entries=without_towers(checkpoint.entries))


def shipped_checkpoint() -> Path:
    """The folder of the small captioner that comes with this package.

    Raises:
        InputError: this copy of the package has none.
    """
    if not is_hf(SHIPPED):
        raise InputError("no checkpoint comes with this copy of the package: name one with --checkpoint REF")
    return SHIPPED


def named_checkpoint(given: str | None) -> Checkpoint:
    """The checkpoint of a user's reference, or the shipped one.

    Raises:
        InputError: as `open_checkpoint`; or none is named and none is shipped.
    """
    return open_checkpoint(given or shipped_checkpoint())


def identity(checkpoint: Checkpoint) -> str:
    """A digest of a checkpoint's content, the same wherever it is stored in one format."""
    digest = hashlib.sha256()
    if isinstance(checkpoint, RunCheckpoint):  # Orbax names its files by random numbers: names tell the contents
        names = sorted(str(path).removeprefix(str(checkpoint.params)) for path in _files(checkpoint.params))
        digest.update("\n".join(names).encode())
    whole = [path for path in checkpoint.side_files.iterdir() if path.suffix in (".json", ".safetensors")]
    for path in progress(sorted(whole), "reading the checkpoint's identity"):
        with path.open("rb") as file:
            digest.update(path.name.encode() + hashlib.file_digest(file, "sha256").digest())
    if isinstance(checkpoint, HfCheckpoint) and is_remote(checkpoint.folder):  # by the checksums of the service
        for path in sorted({tensor.file for tensor in checkpoint.tensors.values()}):
            digest.update(f"{path.name} {storage.fingerprint(str(path))}".encode())
    return digest.hexdigest()


def _files(folder: epath.Path) -> Iterator[epath.Path]:
    """Every file below a folder, which may lie in a bucket."""
    for path in folder.iterdir():
        yield from _files(path) if path.is_dir() else [path]


def load_params(checkpoint: Checkpoint, dtype: str, shardings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Every parameter in `dtype`, with separate layers (`ThinkerConfig.scan` false).

    Args:
        shardings: of the same tree; None: on the default device.
    """
    params: dict[str, Any] = {}
    places = flatten_dict(shardings or {})
    entries = list(checkpoint.entries.values())
    runs = [entries[first : first + READERS] for first in range(0, len(entries), READERS)]
    with ThreadPoolExecutor(READERS) as pool:
        values = (value for run in runs for value in pool.map(checkpoint.read, run))
        for entry, value in progress(zip(entries, values), "loading tensors", len(entries)):
            node = params
            path = tuple(key if key != "layers" else f"layers_{entry.layer}" for key in entry.path)
            for key in path[:-1]:
                node = node.setdefault(key, {})
            node[path[-1]] = jax.device_put(value.astype(jnp.dtype(dtype)), places.get(path))
    return params


def load_sharded(checkpoint: Checkpoint, like: Mapping[str, Any], whole: bool = True) -> dict[str, Any]:
    """Stacked parameters, born where they live: each process reads the parts that its devices hold, once.

    Host memory holds one leaf's local part, and a few layers on their way into it.

    Args:
        like: the tree of ShapeDtypeStructs with shardings and the dtypes that are wanted.
        whole: see that the checkpoint holds nothing else.

    Returns:
        The same tree of arrays, without adapters (`lora_a`, `lora_b`): a checkpoint is read with them merged.

    Raises:
        InputError: the checkpoint is of another model, or its files are damaged.
    """
    stacks: dict[tuple[str, ...], list[Entry]] = {}
    for entry in checkpoint.entries.values():
        stacks.setdefault(entry.path, []).append(entry)
    wanted = {path: leaf for path, leaf in flatten_dict(like).items() if not path[-1].startswith("lora_")}
    if differ := sorted(stacks.keys() ^ wanted.keys() if whole else wanted.keys() - stacks.keys()):
        raise InputError(f"{checkpoint.folder}: of another model, which differs in {'/'.join(differ[0])}")
    leaves = progress(list(wanted.items()), "loading parameters")
    return unflatten_dict({path: _leaf(checkpoint, stacks[path], leaf) for path, leaf in leaves})


def _leaf(checkpoint: Checkpoint, entries: list[Entry], like: jax.ShapeDtypeStruct) -> jax.Array:
    """One parameter, all layers of a stacked one."""
    stacked = int(entries[0].layer is not None)
    indices = like.sharding.addressable_devices_indices_map(like.shape)
    blocks = {
        device: tuple(part.indices(size)[:2] for part, size in zip(index, like.shape))
        for device, index in indices.items()
    }
    parts = {block: np.empty([end - begin for begin, end in block], like.dtype) for block in blocks.values()}
    # Of each layer the smallest block around all of these is read, once, and cut.
    around = [(min(begin for begin, _ in axis), max(end for _, end in axis)) for axis in zip(*parts)][stacked:]
    where = tuple(slice(*axis) for axis in around)

    def fill(entry: Entry) -> None:
        value = checkpoint.read_part(entry, where)
        for block, part in parts.items():
            cut = tuple(slice(begin - low, end - low) for (begin, end), (low, _) in zip(block[stacked:], around))
            if not stacked:
                part[...] = value[cut]
            elif block[0][0] <= entry.layer < block[0][1]:
                part[entry.layer - block[0][0]] = value[cut]

    with ThreadPoolExecutor(READERS) as pool:
        list(pool.map(fill, entries))
    arrays = [jax.device_put(parts[block], device) for device, block in blocks.items()]
    return jax.block_until_ready(jax.make_array_from_single_device_arrays(like.shape, like.sharding, arrays))

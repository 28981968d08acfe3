"""Run folders: `checkpoints/STEP/params` in Orbax format, with separate chunks for each layer of a stack.

RUN/hf/            config.json, tokenizer and other side files of the initial checkpoint, unchanged
RUN/carried/       tensors that are not modelled (talker, token2wav, ...), as safetensors
RUN/checkpoints/STEP/params/    the parameters, stacked over layers

RUN/lora.json      rank and alpha of adapters in a LoRA run; `lora_a` and `lora_b` are next to the kernels

RUN is local or gs://. Adapters are merged when parameters are read.
"""

import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from etils import epath

from avocado_jax.checkpoint.hf import Entry, read_json, table
from avocado_jax.checkpoint.hf_config import read_config
from avocado_jax.checkpoint.references import fetched, is_remote, run_path
from avocado_jax.data import storage
from avocado_jax.data.ordered import map_ordered
from avocado_jax.data.storage_errors import library_errors
from avocado_jax.errors import InputError
from avocado_jax.models.config import Lora, ThinkerConfig
from avocado_jax.models.lora import update_of

CHUNK_BYTES = 64 * 2**20
WRITE_BYTES = 256 * 2**20  # maximum bytes of pieces written concurrently
INDEX_BYTES = 64 * 2**20  # maximum memory for the index of a step


@dataclass(frozen=True)
class Pieces:
    """An array that is never complete in memory. Its pieces, along the first axis, are created when written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[slice | int, np.ndarray]]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


class _PiecesHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Pieces` like numpy arrays, with a few pieces in memory at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: Pieces, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        # Orbax starts all leaves concurrently. This function awaits nothing, so that leaves are written sequentially.
        # Several pieces of a leaf are written concurrently, because the format commits concurrent writes together.
        try:
            array = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()

            def write(piece: tuple[slice | int, np.ndarray]) -> None:
                array[piece[0]].write(np.ascontiguousarray(piece[1])).result()

            for _ in map_ordered(write, value.pieces(), lambda piece: piece[1].nbytes, WRITE_BYTES):
                pass
        except ValueError as error:  # raised by tensorstore for a full disk
            raise OSError(" ".join(str(error).split())[:300]) from error


def row_slices(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """Equal ranges of rows of at most CHUNK_BYTES: the chunks in which Orbax stores a large table."""
    rows = shape[0] if shape else 1
    most = max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:])) * itemsize))
    run = next(run for run in range(min(rows, most), 0, -1) if rows % run == 0) if rows else 1
    return (slice(first, first + run) for first in range(0, rows, run))


def save_args(stacked: bool) -> ocp.SaveArgs:
    """The storage layout of a leaf. Chunks of stacked layers contain only one layer."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


def save_pieces(folder: PurePath, tree: Mapping[str, Any]) -> None:
    """Write a tree of `Pieces` as an Orbax checkpoint, local or gs://. A local `folder` is created atomically."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Pieces, _PiecesHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    args = jax.tree_util.tree_map_with_path(lambda path, _: save_args("layers" in jax.tree_util.keystr(path)), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(run_path(folder), args=ocp.args.PyTreeSave(tree, save_args=args))


class RunCheckpoint(NamedTuple):
    """A finished step of a run folder. Only metadata are read on opening."""

    folder: epath.Path  # run folder
    step: int
    config: ThinkerConfig
    entries: dict[str, Entry]
    config_folder: Path  # the local folder of config.json, the tokenizer and generation settings
    lora: Lora | None  # adapters of the language model's kernels
    arrays: "_Arrays"

    @property
    def params(self) -> epath.Path:
        """The folder of the parameters."""
        return self.folder / "checkpoints" / str(self.step) / "params"

    def open(self, entry: Entry) -> ts.TensorStore:
        """Open the stored array of `entry`, with all layers of a stacked parameter."""
        array = self._stored(entry, entry.path[-1])
        layers, shape = (None, array.shape) if entry.layer is None else (array.shape[0], array.shape[1:])
        known = None if layers is None else sum(other.path == entry.path for other in self.entries.values())
        if layers != known or entry.change.shape(shape, self.config) != entry.shape:
            raise InputError(f"{self.params}: {'/'.join(entry.path)} has shape {list(array.shape)}")
        return array

    def _stored(self, entry: Entry, name: str) -> ts.TensorStore:
        """Open the stored array `name` in the module of a parameter."""
        with self.damage(entry):
            return self.arrays.open(".".join((*entry.path[:-1], name)))

    @contextmanager
    def damage(self, entry: Entry) -> Iterator[None]:
        """Convert tensorstore's errors: to InputError for missing or damaged files, or missing permission.

        Raises:
            StorageError: storage failed; a retry may succeed.
        """
        try:
            with library_errors(str(self.params)):
                yield
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.params}: {'/'.join(entry.path)} cannot be read: {reason}") from error

    def read(self, entry: Entry) -> np.ndarray:
        """Read a parameter, or a layer of a stacked parameter, in our layout."""
        return self.read_part(entry, ())

    def read_part(self, entry: Entry, where: tuple[slice, ...]) -> np.ndarray:
        """Read a block of the result of `read`; reads only its chunks. Kernels with merged adapters are fp32."""
        array = self.open(entry)
        with self.damage(entry):
            value = (array if entry.layer is None else array[entry.layer])[where].read().result()
        return value.astype(np.float32) + self.update(entry, where) if self.has_adapter(entry) else value

    def has_adapter(self, entry: Entry) -> bool:
        """Whether low-rank adapters were trained for this parameter."""
        return self.lora is not None and entry.path[:2] == ("text", "layers") and entry.path[-1] == "kernel"

    def update(self, entry: Entry, where: tuple[slice, ...] = ()) -> np.ndarray:
        """A block of the fp32 update of a kernel by its adapter, in our layout."""
        rows, columns = where or (slice(None), slice(None))
        with self.damage(entry):
            a = self._stored(entry, "lora_a")[entry.layer, rows].read().result()
            b = self._stored(entry, "lora_b")[entry.layer, :, columns].read().result()
        return update_of(a, b, self.lora)


class _Arrays:
    """The stored arrays of a step. Opens each array once, and reads the index of the step once."""

    def __init__(self, params: epath.Path) -> None:
        self._base = f"{params}/" if is_remote(params) else f"file://{params}/"
        self._context = ts.Context(
            {
                "cache_pool#index": {"total_bytes_limit": INDEX_BYTES},
                "gcs_request_concurrency": {"limit": storage.REQUESTS},
            }
        )
        self._opened: dict[str, ts.Future] = {}
        self._lock = threading.Lock()

    def open(self, path: str) -> ts.TensorStore:
        """Open the array of a parameter.

        Raises:
            ValueError: the array is missing or damaged.
        """
        with self._lock:
            if path not in self._opened:
                kvstore = {"driver": "ocdbt", "base": self._base, "path": path, "cache_pool": "cache_pool#index"}
                # A finished step does not change, so cached data are not rechecked.
                spec = {"driver": "zarr", "kvstore": kvstore, "recheck_cached_data": "open"}
                self._opened[path] = ts.open(spec, read=True, context=self._context)
        return self._opened[path].result()


def finished_steps(folder: str | os.PathLike) -> list[int]:
    """The steps that Orbax has committed, oldest first: by a rename on disk, by `commit_success.txt` in a bucket.

    Raises:
        InputError: permission is missing. (gcsfs would report no steps, and a run would restart from 0.)
        StorageError: storage failed.
    """
    steps = str(run_path(folder) / "checkpoints")

    def committed(step: str) -> bool:
        files = ["params/_METADATA"] + ["commit_success.txt"] * storage.is_remote(steps)
        return all(storage.exists(storage.join(steps, f"{step}/{name}")) for name in files)

    names = [name for name in storage.folders(steps) if re.fullmatch(r"\d+", name)]
    return sorted(int(name) for name in names if committed(name))


def open_run(folder: str | os.PathLike, step: int | None = None, copies: bool = False) -> RunCheckpoint:
    """Open a run at `step`, by default its newest finished step.

    Args:
        copies: also download side files that are only copied, from a bucket.

    Raises:
        InputError: the step does not exist, the run has no finished step or no config, or permission is missing.
        StorageError: storage failed.
    """
    path = run_path(folder)
    steps = finished_steps(path)
    if not is_remote(path) and not path.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not steps:
        raise InputError(f"{folder}: no finished step under checkpoints/")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise InputError(f"{folder}: no finished step {step}; there are {', '.join(map(str, steps))}")
    metadata = path / "checkpoints" / str(step) / "params" / "_METADATA"
    with library_errors(str(path)):
        tied = "('head',)" not in read_json(metadata).get("tree_metadata", {})
    config_folder = fetched(path / "hf", copies=copies)
    config = read_config(read_json(config_folder / "config.json"), tied)
    adapters = str(path / "lora.json")
    lora = Lora(**json.loads(storage.read(adapters))) if storage.exists(adapters) else None
    return RunCheckpoint(path, step, config, table(config), config_folder, lora, _Arrays(metadata.parent))

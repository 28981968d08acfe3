"""Run folders: `checkpoints/STEP/params` in Orbax format, each layer of a stack in chunks of its own.

RUN/hf/            config.json, tokenizer and other side files of the checkpoint it came from, verbatim
RUN/carried/       tensors that we do not model (talker, token2wav, ...), as safetensors
RUN/checkpoints/STEP/params/    the parameters, stacked over layers
"""

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts

from avocado_jax.checkpoint.hf import Entry, read_json, table
from avocado_jax.checkpoint.hf_config import read_config
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig

CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Pieces:
    """An array that is never whole: its pieces, along the first axis, are made when they are written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    pieces: Callable[[], Iterator[tuple[slice | int, np.ndarray]]]

    @property
    def size(self) -> int:
        """Number of elements."""
        return int(np.prod(self.shape))


class _PiecesHandler(ocp.type_handlers.NumpyHandler):
    """Writes `Pieces` as Orbax writes a numpy array, one piece in memory at a time."""

    def __init__(self) -> None:
        super().__init__(deepcopy_host_arrays=False)

    async def _open_and_write(self, value: Pieces, tspec: dict[str, Any], ts_context: ts.Context) -> None:
        # Orbax starts all leaves at once; nothing is awaited here, so that they go one after the other.
        try:
            array = ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context).result()
            for where, piece in value.pieces():
                array[where].write(np.ascontiguousarray(piece)).result()
        except ValueError as error:  # so tensorstore says that a disk is full
            raise OSError(" ".join(str(error).split())[:300]) from error


def row_slices(shape: tuple[int, ...], itemsize: int) -> Iterator[slice]:
    """The rows of an array in equal runs of at most CHUNK_BYTES: the chunks in which Orbax stores a large table."""
    rows = shape[0] if shape else 1
    most = max(1, CHUNK_BYTES // max(1, int(np.prod(shape[1:])) * itemsize))
    run = next(run for run in range(min(rows, most), 0, -1) if rows % run == 0) if rows else 1
    return (slice(first, first + run) for first in range(0, rows, run))


def save_args(stacked: bool) -> ocp.SaveArgs:
    """How a leaf is laid out on disk: where layers are stacked, no chunk holds two."""
    return ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES, shard_axes=(0,) if stacked else ())


def save_pieces(folder: Path, tree: Mapping[str, Any]) -> None:
    """Write a tree of `Pieces` as an Orbax checkpoint. `folder` appears only when it is complete."""
    registry = ocp.type_handlers.create_type_handler_registry(
        (Pieces, _PiecesHandler()), (jax.Array, ocp.type_handlers.ArrayHandler())
    )
    handler = ocp.PyTreeCheckpointHandler(type_handler_registry=registry)
    args = jax.tree_util.tree_map_with_path(lambda path, _: save_args("layers" in jax.tree_util.keystr(path)), tree)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(folder.absolute(), args=ocp.args.PyTreeSave(tree, save_args=args))


class RunCheckpoint(NamedTuple):
    """One finished step of a run folder: nothing is read but metadata."""

    folder: Path  # of the run
    step: int
    config: ThinkerConfig
    entries: dict[str, Entry]

    @property
    def side_files(self) -> Path:
        """The folder of config.json, the tokenizer and generation settings."""
        return self.folder / "hf"

    @property
    def params(self) -> Path:
        """Where the parameters lie."""
        return self.folder / "checkpoints" / str(self.step) / "params"

    def open(self, entry: Entry) -> ts.TensorStore:
        """The stored array that holds `entry`: all layers of a stacked parameter."""
        kvstore = {"driver": "ocdbt", "base": f"file://{self.params.absolute()}/", "path": ".".join(entry.path)}
        with self.damage(entry):
            array = ts.open({"driver": "zarr", "kvstore": kvstore}, read=True).result()
        layers, one = (None, array.shape) if entry.layer is None else (array.shape[0], array.shape[1:])
        known = None if layers is None else sum(other.path == entry.path for other in self.entries.values())
        if layers != known or entry.change.shape(one, self.config) != entry.shape:
            raise InputError(f"{self.params}: {'/'.join(entry.path)} has shape {list(array.shape)}")
        return array

    @contextmanager
    def damage(self, entry: Entry) -> Iterator[None]:
        """What tensorstore says of a file that is gone or spoilt, as one line."""
        try:
            yield
        except ValueError as error:
            reason = " ".join(str(error).split())[:200]
            raise InputError(f"{self.params}: {'/'.join(entry.path)} cannot be read: {reason}") from error

    def read(self, entry: Entry) -> np.ndarray:
        """One parameter, or one layer of a stacked one, in our layout."""
        array = self.open(entry)
        with self.damage(entry):
            return (array if entry.layer is None else array[entry.layer]).read().result()

    def read_rows(self, entry: Entry) -> Iterator[np.ndarray]:
        """An unstacked parameter in runs of rows."""
        array = self.open(entry)
        for rows in row_slices(array.shape, array.dtype.numpy_dtype.itemsize):
            with self.damage(entry):
                yield array[rows].read().result()


def is_run(folder: Path) -> bool:
    """Whether `folder` looks like a run."""
    return (folder / "checkpoints").is_dir()


def finished_steps(folder: Path) -> list[int]:
    """Steps whose parameters are complete, oldest first. Orbax writes under another name until they are."""
    names = (path.name for path in (folder / "checkpoints").glob("*") if (path / "params" / "_METADATA").is_file())
    return sorted(int(name) for name in names if re.fullmatch(r"\d+", name))


def open_run(folder: Path, step: int | None = None) -> RunCheckpoint:
    """Open a run at `step`, or at its newest finished one.

    Raises:
        InputError: no such step, or no finished one; no config beside the parameters.
    """
    steps = finished_steps(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    if not steps:
        raise InputError(f"{folder}: no finished step under checkpoints/")
    if step is None:
        step = steps[-1]
    if step not in steps:
        raise InputError(f"{folder}: no finished step {step}; there are {', '.join(map(str, steps))}")
    metadata = folder / "checkpoints" / str(step) / "params" / "_METADATA"
    tied = "('head',)" not in read_json(metadata).get("tree_metadata", {})
    config = read_config(read_json(folder / "hf" / "config.json"), tied)
    return RunCheckpoint(folder, step, config, table(config))

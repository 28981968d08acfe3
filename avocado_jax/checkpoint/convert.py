"""Convert a Hugging Face folder to a run folder and back, streaming one tensor or layer at a time."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from avocado_jax.checkpoint.hf import SAME, Entry, HfCheckpoint, copied_files, open_hf, read_json, refuse_code
from avocado_jax.checkpoint.hf_config import declare_dtype
from avocado_jax.checkpoint.load import Checkpoint, open_checkpoint
from avocado_jax.checkpoint.orbax import CHUNK_BYTES, Pieces, RunCheckpoint, open_run, row_slices, save_pieces
from avocado_jax.checkpoint.references import commit_of, located, run_path
from avocado_jax.checkpoint.safetensors import SHARD_BYTES, Spec, Tensor, read_header, write_shards
from avocado_jax.data import storage
from avocado_jax.data.hub import Busy, hub_errors, silence_client
from avocado_jax.data.ordered import map_ordered
from avocado_jax.data.storage_errors import library_errors
from avocado_jax.data.timeouts import retried
from avocado_jax.errors import InputError
from avocado_jax.models.config import Lora
from avocado_jax.progress import progress

MARK = ".being-converted"  # marks an unfinished folder, which may be deleted
MADE = ".made-from.json"  # written by `to_hf`: the run, the step and the dtype
COMMITTED = "checkpoints/0/commit_success.txt"
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def from_hf(source: str | os.PathLike, target: str | os.PathLike, reading: Mapping[str, Any] = {}) -> None:
    """Convert a checkpoint in Hugging Face format to the run folder `target`, at step 0. Keeps the dtypes.

    Args:
        source: a model reference (references.py).
        target: local or gs://.
        reading: properties of the checkpoint's reading, added to its `reading.json`.

    Raises:
        InputError: `source` is not a valid checkpoint, or `target` exists.
        StorageError: storage failed, or the hub cannot be reached.
    """
    checkpoint = open_hf(located(source, "copies"), copies=True)
    done = progress(range(len(checkpoint.entries) + 1), "tensors", len(checkpoint.entries))
    stacks = _stacks(checkpoint, lambda: next(done))
    nbytes = sum(map(_nbytes, [*checkpoint.tensors.values(), *checkpoint.carried.values()]))
    with _output_folder(str(target), nbytes) as folder, library_errors(str(target)):
        _write_beside(checkpoint, folder, reading)
        save_pieces(run_path(folder) / "checkpoints" / "0" / "params", stacks)
        storage.write(storage.join(folder, COMMITTED), b"")  # Orbax's marker of a finished step in a bucket


class Exported(NamedTuple):
    """The result of `to_hf`.

    Attributes:
        step: the exported step.
        rounding: relative rounding error of the adapters' updates in the exported dtype: |rounded - exact| / |update|,
            Frobenius norms over all merged kernels. None without adapters, or if an earlier target was kept.
    """

    step: int
    rounding: float | None


def to_hf(
    source: str | os.PathLike,
    target: str | os.PathLike,
    step: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    keep: bool = False,
) -> Exported:
    """Export step `step` of a run (default: the newest finished one) as a checkpoint for transformers.

    Tensors are written in their stored dtype, or in `dtype`. Tensors that are not modelled are copied unchanged.
    Low-rank adapters are merged in fp32 before the cast.

    Args:
        target: local or gs://.
        keep: keep an existing target of an earlier call with the same step and dtype.

    Raises:
        InputError: the run or step does not exist, or `target` exists.
    """
    run = open_run(source, step, copies=True)
    prefix, carried = _read_carried(run)
    arrays = map_ordered(run.open, run.entries.values())
    specs = [
        Spec(f"{prefix}{name}", DTYPES[dtype] if dtype else array.dtype.numpy_dtype, entry.shape)
        for array, (name, entry) in zip(arrays, run.entries.items())
    ]
    specs += [Spec(name, tensor.dtype, tensor.shape) for name, tensor in carried.items()]

    lost = total = 0.0  # squared norms

    def values() -> Iterator[np.ndarray]:
        nonlocal lost, total
        dtypes = dict(zip(run.entries, (spec.dtype for spec in specs)))
        parts = [_Part(entry, rows) for entry in run.entries.values() for rows in _row_slices(entry)]
        done = progress(range(len(parts) + 1), "pieces of tensors", len(parts))
        for cast, lost_here, total_here in map_ordered(
            lambda part: part.exported(run, dtypes[part.entry.name]), parts, _Part.nbytes
        ):
            next(done)
            lost, total = lost + lost_here, total + total_here
            yield cast
        yield from _pieces_of(carried.values())

    refuse_code(run.config_folder)
    made = {"run": str(run.folder), "step": run.step, "dtype": dtype}
    if keep and Path(target, MADE).is_file() and read_json(Path(target, MADE)) == made:
        return Exported(run.step, None)
    with _output_folder(str(target), sum(spec.nbytes for spec in specs)) as folder:
        remote = storage.is_remote(folder)
        with tempfile.TemporaryDirectory() if remote else nullcontext(folder) as local:

            def upload(path: Path) -> None:
                storage.upload(path, storage.join(folder, path.name))

            write_shards(Path(local), specs, values(), shard_bytes, upload if remote else lambda path: None)
        # config.json is written last: without it a folder in a bucket is not a checkpoint.
        for path in sorted(copied_files(run.config_folder), key=lambda path: path.name == "config.json"):
            data = path.read_bytes()
            if dtype and path.name == "config.json":
                data = (json.dumps(declare_dtype(read_json(path), dtype), indent=2) + "\n").encode()
            storage.write(storage.join(folder, path.name), data)
        if not remote:
            storage.write(storage.join(folder, MADE), json.dumps(made).encode())
    return Exported(run.step, math.sqrt(lost / total) if total else None)


def push(folder: Path, name: str) -> str:
    """Upload a folder of `to_hf` to the repository `name` on the hub, which is created if needed.

    A repeated call uploads only missing files. Weights of earlier pushes with other file names are removed.

    Returns:
        The URL of the commit.

    Raises:
        InputError: the token or the permission is missing.
        StorageError: the hub cannot be reached or is busy.
    """
    from huggingface_hub import HfApi

    silence_client()
    api = HfApi()
    stale = ["*.safetensors", "*.safetensors.index.json"]

    def push_folder() -> str:
        with hub_errors(name):
            api.create_repo(name, exist_ok=True)
            done = api.upload_folder(repo_id=name, folder_path=folder, ignore_patterns=[MADE], delete_patterns=stale)
            return done.commit_url

    return retried(push_folder, name, (Busy,), storage.PATIENCE)


def begin_run(
    init: str | os.PathLike,
    folder: str | os.PathLike,
    lora: Lora | None = None,
    reading: Mapping[str, Any] = {},
) -> None:
    """Write the side files and unmodelled tensors of `init` to a training run.

    Existing files are overwritten, so that an interrupted start can be repeated. One process calls this before the
    first checkpoint is saved.

    Args:
        init: the model reference of the initial checkpoint.
        folder: the run folder, local or gs://.
        lora: the adapters to train.
        reading: properties of the training clips' reading, added to the `reading.json` of `init`.
    """
    _write_beside(open_checkpoint(init, copies=True), str(folder), reading, lora)


def _write_beside(checkpoint: Checkpoint, folder: str, reading: Mapping[str, Any], lora: Lora | None = None) -> None:
    """Write all files of a run folder except its checkpoints."""
    prefix, carried = _read_carried(checkpoint)
    remote = storage.is_remote(folder)
    scratch = Path(tempfile.mkdtemp()) if remote else Path(folder, ".beginning")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    source = {"prefix": prefix} | ({"hub": commit} if (commit := commit_of(checkpoint.folder)) else {})
    try:
        (scratch / "hf").mkdir()
        for path in copied_files(checkpoint.config_folder):
            shutil.copyfile(path, scratch / "hf" / path.name)
        stated = scratch / "hf" / "reading.json"
        stored = (read_json(stated) if stated.is_file() else {}) | dict(reading)
        written = {"source.json": source, "hf/reading.json": stored, "lora.json": asdict(lora) if lora else {}}
        for name, value in written.items():
            if value:
                (scratch / name).write_text(json.dumps(value) + "\n")
        if carried:
            (scratch / "carried").mkdir()
            specs = [Spec(name, tensor.dtype, tensor.shape) for name, tensor in carried.items()]
            write_shards(scratch / "carried", specs, _pieces_of(carried.values()))
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            storage.upload(path, storage.join(folder, str(path.relative_to(scratch))))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _read_carried(checkpoint: Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """The name prefix of the modelled tensors in Hugging Face format, and the unmodelled tensors."""
    if isinstance(checkpoint, HfCheckpoint):
        return checkpoint.prefix, checkpoint.carried
    with library_errors(str(checkpoint.folder)):
        written = read_json(checkpoint.folder / "source.json")
    prefix = written.get("prefix") if isinstance(written, dict) else None
    if prefix not in ("", "thinker."):
        raise InputError(f"{checkpoint.folder / 'source.json'}: no prefix of tensor names")
    carried: dict[str, Tensor] = {}
    folder = checkpoint.folder / "carried"
    for name in storage.names(str(folder)):
        if name.endswith(".safetensors"):
            carried |= read_header(folder / name)
    return prefix, carried


@contextmanager
def _output_folder(target: str, nbytes: int) -> Iterator[str]:
    """Provide a folder for writing `target`. A local folder is renamed to `target` when the block succeeds.

    Buckets have no renames. There, a marker file shows that the folder is unfinished, and the caller must write the
    file that identifies a checkpoint last.
    """
    if storage.is_remote(target):
        with library_errors(target):
            path = run_path(target)
            if path.exists():
                if not storage.exists(storage.join(target, MARK)):
                    raise InputError(f"{target}: already exists")
                path.rmtree()  # left by a killed conversion
            storage.write(storage.join(target, MARK), b"")
            yield target
            storage.delete(storage.join(target, MARK))
        return
    final = Path(target)
    if final.exists():
        raise InputError(f"{target}: already exists")
    final.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(final.parent).free
    if nbytes > free:
        raise InputError(f"{target}: needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    partial = final.with_name(final.name + ".partial")
    if partial.exists() and not (partial / MARK).exists():
        raise InputError(f"{partial}: already exists and was not made by this command")
    shutil.rmtree(partial, ignore_errors=True)  # left by a killed conversion
    partial.mkdir()
    try:
        (partial / MARK).touch()
        yield str(partial)
        (partial / MARK).unlink()
        partial.rename(final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _pieces_of(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    parts = [(tensor, rows) for tensor in tensors for rows in row_slices(tensor.shape, tensor.dtype.itemsize)]
    return map_ordered(lambda part: part[0].read(part[1]), parts, lambda part: min(_nbytes(part[0]), CHUNK_BYTES))


def _stacks(checkpoint: HfCheckpoint, on_tensor: Callable[[], object]) -> dict:
    """The tree of this package's parameters as `Pieces` that read the checkpoint's tensors."""
    stacks: dict[tuple[str, ...], list[Entry]] = {}
    for entry in checkpoint.entries.values():
        stacks.setdefault(entry.path, []).append(entry)
    tree: dict = {}
    for path, entries in stacks.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = _stack(checkpoint, entries, on_tensor)
    return tree


def _stack(checkpoint: HfCheckpoint, entries: list[Entry], on_tensor: Callable[[], object]) -> Pieces:
    """One parameter of this package: a stack with one piece per layer, or a single tensor."""
    first = entries[0]
    tensors = [checkpoint.tensors[entry.name] for entry in entries]
    for entry, tensor in zip(entries, tensors):
        if tensor.dtype != tensors[0].dtype:
            raise InputError(
                f"{tensor.file}: '{entry.name}' is {tensor.dtype.name} but '{first.name}' is "
                f"{tensors[0].dtype.name}: the layers of a stack share one dtype"
            )
    shape = first.change.ours(np.broadcast_to(np.int8(0), first.shape)).shape

    def layers() -> Iterator[tuple[int, np.ndarray]]:
        values = map_ordered(checkpoint.read, entries, lambda entry: _nbytes(checkpoint.tensors[entry.name]))
        for value, entry in zip(values, entries):
            yield entry.layer, value
            on_tensor()

    def rows() -> Iterator[tuple[slice, np.ndarray]]:
        yield from zip(row_slices(first.shape, tensors[0].dtype.itemsize), _pieces_of(tensors[:1]))
        on_tensor()

    def converted() -> Iterator[tuple[slice, np.ndarray]]:
        yield slice(None), checkpoint.read(first)
        on_tensor()

    if first.layer is not None:
        return Pieces((len(entries), *shape), tensors[0].dtype, layers)
    return Pieces(shape, tensors[0].dtype, rows if first.change is SAME else converted)


class _Part(NamedTuple):
    """A tensor to write, or some rows of a large table."""

    entry: Entry
    rows: slice | None  # None: a complete tensor, if its layout changes or it is a layer of a stack

    def exported(self, run: RunCheckpoint, dtype: np.dtype) -> tuple[np.ndarray, float, float]:
        """Values in the exported layout and dtype; squared norms of the rounding error and of the adapter's update."""
        value = run.read_part(self.entry, () if self.rows is None else (self.rows,))
        cast = value.astype(dtype)
        lost = total = 0.0
        if run.has_adapter(self.entry):
            lost = float(np.sum(np.square(cast.astype(np.float32) - value)))
            total = float(np.sum(np.square(run.update(self.entry))))
        theirs = self.entry.change.theirs(cast, self.entry.shape) if self.rows is None else cast
        return np.ascontiguousarray(theirs), lost, total

    def nbytes(self) -> int:
        rows = self.rows
        return 4 * math.prod(self.entry.shape if rows is None else (rows.stop - rows.start, *self.entry.shape[1:]))


def _row_slices(entry: Entry) -> Iterable[slice | None]:
    """The pieces of a tensor: row ranges for large tables without a layout change."""
    return row_slices(entry.shape, 4) if entry.layer is None and entry.change is SAME else [None]

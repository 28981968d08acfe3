"""Hugging Face folder to run folder and back, streaming: one tensor, one layer of a stack, in memory at a time."""

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import ml_dtypes
import numpy as np

from avocado_jax.checkpoint.hf import SAME, Entry, HfCheckpoint, copied_files, open_hf, read_json, refuse_code
from avocado_jax.checkpoint.hf_config import declare_dtype
from avocado_jax.checkpoint.load import Checkpoint, open_checkpoint
from avocado_jax.checkpoint.orbax import (
    Pieces,
    RunCheckpoint,
    fetched,
    is_remote,
    open_run,
    row_slices,
    run_path,
    save_pieces,
)
from avocado_jax.checkpoint.safetensors import SHARD_BYTES, Spec, Tensor, read_header, write_shards
from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.models.config import Lora
from avocado_jax.progress import progress

MARK = ".being-converted"  # in a folder that may be deleted
DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def from_hf(source: Path, target: Path) -> None:
    """Make the run folder `target`, at step 0, of a checkpoint in Hugging Face format; dtypes are kept.

    Raises:
        InputError: `source` is not a sound checkpoint, or `target` exists.
    """
    checkpoint = open_hf(source)
    done = progress(range(len(checkpoint.entries) + 1), "tensors", len(checkpoint.entries))
    stacks = _stacks(checkpoint, lambda: next(done))
    with _appearing(target, sum(map(_nbytes, [*checkpoint.tensors.values(), *checkpoint.carried.values()]))) as folder:
        _write_beside(checkpoint, folder)
        save_pieces(folder / "checkpoints" / "0" / "params", stacks)
        (folder / "checkpoints" / "0" / "commit_success.txt").touch()  # so that the run may be copied to a bucket


def to_hf(
    source: str | os.PathLike,
    target: Path,
    step: int | None = None,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> int:
    """Write step `step` of a run (the newest finished one) as a checkpoint that transformers loads.

    Tensors keep the dtype they are stored in, or take `dtype`; what was carried through is not touched.

    Returns:
        The step that was written.

    Raises:
        InputError: no such run or step, or `target` exists.
    """
    run = open_run(source, step)
    prefix, carried = _beside(run)
    specs = [
        Spec(f"{prefix}{name}", DTYPES[dtype] if dtype else run.open(entry).dtype.numpy_dtype, entry.shape)
        for name, entry in run.entries.items()
    ]
    specs += [Spec(name, tensor.dtype, tensor.shape) for name, tensor in carried.items()]

    def values() -> Iterator[np.ndarray]:
        for entry, spec in progress(list(zip(run.entries.values(), specs)), "tensors"):
            for piece in _their_pieces(run, entry):
                yield piece.astype(spec.dtype)
        yield from _pieces_of(carried.values())

    with _appearing(target, sum(spec.nbytes for spec in specs)) as folder:
        for path in copied_files(run.side_files):
            shutil.copyfile(path, folder / path.name)
        if dtype:
            config = declare_dtype(read_json(folder / "config.json"), dtype)
            (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        write_shards(folder, specs, values(), shard_bytes)
        refuse_code(folder)
    return run.step


def begin_run(init: str | os.PathLike, folder: str | os.PathLike, lora: Lora | None = None) -> None:
    """Put into a training run what its checkpoints are used with: the side files and carried tensors of `init`.

    What is there already is written again: a beginning that was killed is simply begun once more. One process calls
    it, before the first checkpoint is saved.

    Args:
        init: the checkpoint that training starts from: Hugging Face folder or run.
        folder: of the run, local or gs://.
        lora: the adapters that will be trained.
    """
    checkpoint, run = open_checkpoint(init), run_path(folder)
    scratch = Path(tempfile.mkdtemp()) if is_remote(run) else Path(run, ".beginning")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        _write_beside(checkpoint, scratch)
        if lora is not None:
            (scratch / "lora.json").write_text(json.dumps(asdict(lora)) + "\n")
        for path in sorted(path for path in scratch.rglob("*") if path.is_file()):
            storage.upload(path, str(run / path.relative_to(scratch)))
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _write_beside(checkpoint: Checkpoint, folder: Path) -> None:
    """Everything of a run folder but its checkpoints."""
    prefix, carried = _beside(checkpoint)
    (folder / "hf").mkdir()
    for path in copied_files(checkpoint.side_files):
        shutil.copyfile(path, folder / "hf" / path.name)
    (folder / "source.json").write_text(json.dumps({"prefix": prefix}) + "\n")
    if carried:
        (folder / "carried").mkdir()
        specs = [Spec(name, tensor.dtype, tensor.shape) for name, tensor in carried.items()]
        write_shards(folder / "carried", specs, _pieces_of(carried.values()))


def _beside(checkpoint: Checkpoint) -> tuple[str, dict[str, Tensor]]:
    """The prefix of the modelled tensors' names in Hugging Face format, and the tensors that are not modelled."""
    if isinstance(checkpoint, HfCheckpoint):
        return checkpoint.prefix, checkpoint.carried
    with storage.library_errors(str(checkpoint.folder)):
        written = read_json(checkpoint.folder / "source.json")
    prefix = written.get("prefix") if isinstance(written, dict) else None
    if prefix not in ("", "thinker."):
        raise InputError(f"{checkpoint.folder / 'source.json'}: no prefix of tensor names")
    carried: dict[str, Tensor] = {}
    folder = checkpoint.folder / "carried"
    for path in sorted(fetched(folder).glob("*.safetensors")) if storage.names(str(folder)) else ():
        carried |= read_header(path)
    return prefix, carried


@contextmanager
def _appearing(target: Path, nbytes: int) -> Iterator[Path]:
    """A folder to fill that takes the name `target` only when the block ends well."""
    if target.exists():
        raise InputError(f"{target}: already exists")
    target.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(target.parent).free
    if nbytes > free:
        raise InputError(f"{target}: needs {nbytes / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free")
    partial = target.with_name(target.name + ".partial")
    if partial.exists() and not (partial / MARK).exists():
        raise InputError(f"{partial}: is in the way, and not ours to delete")
    shutil.rmtree(partial, ignore_errors=True)  # what a killed conversion left
    partial.mkdir()
    try:
        (partial / MARK).touch()
        yield partial
        (partial / MARK).unlink()
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _nbytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape) * tensor.dtype.itemsize


def _pieces_of(tensors: Iterable[Tensor]) -> Iterator[np.ndarray]:
    return (tensor.read(rows) for tensor in tensors for rows in row_slices(tensor.shape, tensor.dtype.itemsize))


def _stacks(checkpoint: HfCheckpoint, on_tensor: Callable[[], object]) -> dict:
    """The tree of our parameters as `Pieces` that read theirs."""
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
    """One of our parameters: a stack with a layer a piece, or a single tensor."""
    first = entries[0]
    tensors = [checkpoint.tensors[entry.name] for entry in entries]
    for entry, tensor in zip(entries, tensors):
        if tensor.dtype != tensors[0].dtype:
            raise InputError(
                f"{tensor.file}: '{entry.name}' is {tensor.dtype.name} but '{first.name}' is "
                f"{tensors[0].dtype.name}: the layers of a stack share one dtype"
            )
    one = first.change.ours(np.broadcast_to(np.int8(0), first.shape)).shape

    def layers() -> Iterator[tuple[int, np.ndarray]]:
        for entry in entries:
            yield entry.layer, checkpoint.read(entry)
            on_tensor()

    def rows() -> Iterator[tuple[slice, np.ndarray]]:
        for where in row_slices(first.shape, tensors[0].dtype.itemsize):
            yield where, tensors[0].read(where)
        on_tensor()

    def whole() -> Iterator[tuple[slice, np.ndarray]]:
        yield slice(None), checkpoint.read(first)
        on_tensor()

    if first.layer is not None:
        return Pieces((len(entries), *one), tensors[0].dtype, layers)
    return Pieces(one, tensors[0].dtype, rows if first.change is SAME else whole)


def _their_pieces(run: RunCheckpoint, entry: Entry) -> Iterator[np.ndarray]:
    """One tensor in their layout; the big tables that keep their layout come in runs of rows."""
    if entry.layer is None and entry.change is SAME:
        yield from run.read_rows(entry)
    else:
        yield entry.change.theirs(run.read(entry), entry.shape)

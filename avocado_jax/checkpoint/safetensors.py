"""Read and write the safetensors format one tensor at a time.

The safetensors library maps complete shards into memory and writes only complete dictionaries, which does not suit
streaming conversions. The format is a header (8 bytes of length, JSON) followed by the data. Tests compare with the
library. Headers are untrusted: every field is validated.
"""

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import ml_dtypes
import numpy as np

from avocado_jax.data import storage
from avocado_jax.errors import InputError

DTYPES = {
    "BOOL": np.bool_,
    "U8": np.uint8,
    "I8": np.int8,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "U16": np.uint16,
    "I16": np.int16,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "U32": np.uint32,
    "I32": np.int32,
    "F32": np.float32,
    "U64": np.uint64,
    "I64": np.int64,
    "F64": np.float64,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}
HEADER_LIMIT = 100 * 2**20  # the library's limit
SHARD_BYTES = 5 * 10**9


class Tensor(NamedTuple):
    """The location of a tensor."""

    file: PurePath  # local, or in a bucket
    dtype: np.dtype
    shape: tuple[int, ...]
    offset: int  # offset of its first byte in the file

    def read(self, rows: slice = slice(None)) -> np.ndarray:
        """Read the values, or only those of a range of the first axis.

        Raises:
            InputError: the file is missing or truncated.
            StorageError: storage failed.
        """
        if self.shape:
            first, last, _ = rows.indices(self.shape[0])
            shape = (last - first, *self.shape[1:])
            row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        else:
            first, shape, row_bytes = 0, (), 0
        start = self.offset + first * row_bytes
        values = np.empty(shape, self.dtype)
        if storage.read_into(str(self.file), start, values.reshape(-1).view(np.uint8).data) != values.nbytes:
            raise InputError(f"{self.file}: ends in the middle of a tensor")
        return values

    def mapped(self) -> np.ndarray:
        """The memory-mapped values of a local file."""
        return np.memmap(self.file, self.dtype, "r", self.offset, self.shape)


def _pairs(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a JSON object and reject duplicate names."""
    out = dict(pairs)
    if len(out) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"'{next(name for name in names if names.count(name) > 1)}' appears twice")
    return out


def read_header(path: PurePath) -> dict[str, Tensor]:
    """Read the tensors of one file.

    Raises:
        InputError: the file is truncated, its header is not JSON or has duplicate names or unknown dtypes, or offsets
            overlap, exceed the file or do not match the shape. The message names the file and the error.
    """
    size = storage.size(str(path))
    length = int.from_bytes(storage.read_range(str(path), 0, min(8, size)), "little")
    if size < 8 or length > min(HEADER_LIMIT, size - 8):
        raise InputError(f"{path}: not a safetensors file, or cut short")
    text = storage.read_range(str(path), 8, length)
    try:
        header = json.loads(text, object_pairs_hook=_pairs)
        if not isinstance(header, dict):
            raise ValueError("the header is not an object")
        tensors = {
            name: _tensor(path, name, entry, 8 + length, size)
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: bad safetensors header: {error}") from error
    end = 8 + length
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].offset):
        if tensor.offset < end:
            raise InputError(f"{path}: tensor '{name}' overlaps the one before it")
        end = tensor.offset + math.prod(tensor.shape) * tensor.dtype.itemsize
    return tensors


def _tensor(path: PurePath, name: str, entry: object, base: int, size: int) -> Tensor:
    if not isinstance(entry, dict):
        raise ValueError(f"'{name}' is not described by an object")
    (begin, end), shape, dtype = entry["data_offsets"], entry["shape"], entry["dtype"]
    if dtype not in DTYPES:
        raise ValueError(f"'{name}' has unknown dtype '{dtype}'")
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise ValueError(f"'{name}' has a shape or offsets that are not whole numbers")
    tensor = Tensor(path, np.dtype(DTYPES[dtype]), tuple(shape), base + begin)
    if end - begin != math.prod(shape) * tensor.dtype.itemsize or base + end > size:
        raise ValueError(f"'{name}' does not fit its offsets or the file")
    return tensor


class Spec(NamedTuple):
    """A tensor to write."""

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The size in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_shards(
    folder: Path,
    specs: Iterable[Spec],
    values: Iterator[np.ndarray],
    shard_bytes: int = SHARD_BYTES,
    on_file: Callable[[Path], object] = lambda path: None,
) -> None:
    """Write `model*.safetensors` of at most `shard_bytes` each, with an index if there are several.

    Args:
        folder: an existing folder; files with the same names are overwritten.
        specs: the tensors in order.
        values: the values of the tensors in the same order, each as one array or several arrays of complete rows.
            Consumed one at a time and not kept in memory.
        on_file: called with each complete file; may move the file.
    """
    shards: list[list[Spec]] = [[]]
    used = 0
    for spec in specs:
        if shards[-1] and used + spec.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(spec)
        used += spec.nbytes
    where = {}
    for number, shard in enumerate(shards, start=1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(folder / name, shard, values)
        on_file(folder / name)
        where |= {spec.name: name for spec in shard}
    if len(shards) > 1:
        total = sum(spec.nbytes for shard in shards for spec in shard)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        on_file(folder / "model.safetensors.index.json")


def _write_shard(path: Path, specs: list[Spec], values: Iterator[np.ndarray]) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset := offset + spec.nbytes],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for spec in specs:
            left = spec.nbytes
            while left > 0:
                piece = np.ascontiguousarray(next(values))
                if piece.dtype != spec.dtype or piece.nbytes > left:
                    raise ValueError(f"'{spec.name}': values do not fit {spec}")
                file.write(piece.reshape(-1).view(np.uint8).data)
                left -= piece.nbytes
            # Flush after each tensor, so that dirty pages do not fill the memory of a small machine.
            file.flush()
        os.fsync(file.fileno())

"""Streaming safetensors files against the safetensors library, and invalid files."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from avocado_jax.checkpoint.safetensors import DTYPES, Spec, read_header, write_shards
from avocado_jax.errors import InputError

RNG = np.random.default_rng(0)


def tensors():
    """One tensor of each dtype, and unusual shapes."""
    out = {
        name: (RNG.standard_normal((3, 5)) * 10).astype(dtype) if name != "BOOL" else RNG.integers(0, 2, (3, 5)) > 0
        for name, dtype in DTYPES.items()
    }
    return out | {"scalar": np.array(2.5, np.float32), "empty": np.zeros((0, 4), np.float32)}


def test_reads_files_of_the_library(tmp_path):
    written = {name: value for name, value in tensors().items() if not name.startswith("F8")}
    save_file(written, tmp_path / "a.safetensors", metadata={"format": "pt"})
    found = read_header(tmp_path / "a.safetensors")
    assert set(found) == set(written)
    for name, value in written.items():
        assert found[name].read().tobytes() == value.tobytes()
    np.testing.assert_array_equal(found["F32"].read(slice(1, 3)), written["F32"][1:3])


def test_library_reads_our_files(tmp_path):
    values = {name: value for name, value in tensors().items() if not name.startswith("F8")}  # not in numpy
    specs = [Spec(name, value.dtype, value.shape) for name, value in values.items()]
    # A tensor is written in one piece or in blocks of rows; an empty tensor has no piece.
    halves = {name: (value[:1], value[1:]) if value.ndim else (value,) for name, value in values.items() if value.size}
    write_shards(tmp_path, specs, (piece for pieces in halves.values() for piece in pieces))
    (path,) = tmp_path.glob("*")
    found = load_file(path)
    for name, value in values.items():
        assert found[name].tobytes() == value.tobytes()
        assert found[name].dtype == value.dtype


def test_shards_and_index(tmp_path):
    specs = [Spec(f"t{i}", np.dtype(np.float32), (100,)) for i in range(5)]
    write_shards(tmp_path, specs, (np.full(100, i, np.float32) for i in range(5)), shard_bytes=900)
    names = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    for i in range(5):
        assert load_file(tmp_path / index["weight_map"][f"t{i}"])[f"t{i}"][0] == i


def test_arrays_of_another_dtype_are_refused(tmp_path):
    with pytest.raises(ValueError, match="do not fit"):
        write_shards(
            tmp_path, [Spec("a", np.dtype(np.float32), (2,))], iter([np.zeros(2, ml_dtypes.bfloat16), np.zeros(9)])
        )


def header_file(path: Path, header: object, body: bytes = bytes(64)) -> Path:
    """Write a file with this header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + body)
    return path


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    """Header entry of one tensor."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        ([1], "not an object"),
        (b"{", "header"),
        (b'{"a": 1}', "not described"),
        (b'{"a": {"dtype":"F32","shape":[1],"data_offsets":[0,4]}, "a": {}}', "twice"),
        ({"a": entry("F31")}, "unknown dtype"),
        ({"a": entry(shape=(-2,))}, "not whole"),
        ({"a": entry(shape=(2.0,))}, "not whole"),
        ({"a": entry(shape=(True,), offsets=(0, 4))}, "not whole"),
        ({"a": entry(offsets=(0, 12))}, "does not fit"),
        ({"a": entry(offsets=(60, 68))}, "does not fit"),
        ({"a": entry(offsets=(8, 0))}, "does not fit"),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, "overlaps"),
        ({"a": {"dtype": "F32"}}, "header"),
        (b"[" * 100_000, "header"),
    ],
)
def test_invalid_headers_are_refused(tmp_path, header, reason):
    with pytest.raises(InputError, match=reason) as error:
        read_header(header_file(tmp_path / "x.safetensors", header))
    assert "x.safetensors" in str(error.value)


@pytest.mark.parametrize("content", [b"", b"\x00", bytes(8) + b"", (2**60).to_bytes(8, "little") + b"{}"])
def test_truncated_files_are_refused(tmp_path, content):
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError):
        read_header(tmp_path / "x.safetensors")


@settings(
    max_examples=300, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(removed=st.integers(0, 400), flips=st.lists(st.tuples(st.integers(0, 399), st.integers(0, 255)), max_size=6))
def test_damaged_files_are_refused_or_valid(tmp_path, removed, flips):
    path = tmp_path / "x.safetensors"
    save_file({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.zeros(5, np.int8)}, path)
    content = bytearray(path.read_bytes())
    for position, value in flips:
        content[position % len(content)] = value
    path.write_bytes(content[: len(content) - removed % len(content)] if removed > 200 else content)
    try:
        found = read_header(path)
    except InputError:
        return
    for tensor in found.values():
        assert tensor.read().nbytes <= len(content)

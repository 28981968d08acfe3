"""Data sets on the hub: listing, streaming and range reads at one commit, without a local copy."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from hub import TOKEN, hub_server

from avocado_jax.data import ranges, storage
from avocado_jax.data.hub import open_dataset
from avocado_jax.errors import InputError, exit_status

SOURCE = "hub:ORG/set"


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A server with a manifest, a tar part, and more files than one page of a listing."""
    rng = np.random.default_rng(0)
    clips = {f"videos/{number}.mp4": rng.bytes(3000) for number in range(20)}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in clips.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    files = {"lines.jsonl": b'{"id": "a"}\n' * 3, "parts/videos.part-000.tar.gz": packed.getvalue()}
    files |= {f"more/{number:03}.json": b"{}" for number in range(30)}
    monkeypatch.setattr(storage, "PATIENCE", 0.3)
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add("ORG/set", files, "datasets")
        yield hub, clips


def spans_of(hub) -> list[tuple[int, int]]:
    """First and last byte of each range that was requested."""
    ranges = [request.range.removeprefix("bytes=") for request in hub.requests if request.origin == "cdn"]
    return [tuple(map(int, span.split("-"))) for span in ranges]


def test_listing_ranges_and_streaming(served, tmp_path, monkeypatch):
    hub, clips = served
    data = hub.repos["datasets", "ORG/set"]
    dataset = pickle.loads(pickle.dumps(open_dataset(SOURCE)))
    assert dataset.commit == data.refs["main"]
    assert dataset.sizes == {name: len(content) for name, content in data.commits[dataset.commit].items()}
    assert dataset.open("lines.jsonl").readlines() == [b'{"id": "a"}\n'] * 3
    part = "parts/videos.part-000.tar.gz"
    data.commit({"lines.jsonl": b""})  # a later commit changes nothing for this reader
    monkeypatch.setattr(ranges, "BLOCK", 4096)
    cuts = iter([True, False] * 100)
    hub.faults = lambda request: "cut" if request.origin == "cdn" and next(cuts) else ""
    hub.requests.clear()
    with tarfile.open(fileobj=dataset.open(part), mode="r|gz") as tar:
        assert {member.name: tar.extractfile(member).read() for member in tar} == clips
    spans = spans_of(hub)
    assert spans[::2] == spans[1::2]  # each was cut short once
    assert [first for first, _ in spans[::2]] == [0, *(last + 1 for _, last in spans[::2])][:-1]
    assert len(spans) > 6
    hub.faults = lambda request: ""
    hub.requests.clear()
    with dataset.open(part) as file:
        whole = data.commits[dataset.commit][part]
        file.seek(-100, io.SEEK_END)
        assert file.read() == whole[-100:]
        file.seek(20_000)
        assert file.read(10) == whole[20_000:20_010]
    assert spans_of(hub)[0] == (len(whole) - 100, len(whole) - 1)
    hub.requests.clear()
    assert dataset.open(part).read() == whole
    assert len(spans_of(hub)) == -(-len(whole) // ranges.BLOCK)
    assert not list((tmp_path / "home").rglob("blobs/*"))


@pytest.mark.parametrize(
    ("case", "status", "reason"),
    [("form", 2, "not of the form"), ("missing", 2, "no such repository"), ("revision", 2, "no such revision"),
     ("gated", 2, "access is gated"), ("file", 2, "no file 'x'"), ("429", 1, "busy"), ("network", 1, "be reached")],
)  # fmt: skip
def test_hub_errors_are_one_line(served, monkeypatch, case, status, reason):
    hub, _ = served
    source = {"form": "hub:set", "missing": "hub:ORG/other", "revision": "hub:ORG/set@v9"}.get(case, SOURCE)
    if case == "gated":
        hub.repos["datasets", "ORG/set"].access = "gated"
        monkeypatch.setenv("HF_TOKEN", TOKEN)
    elif case == "429":
        hub.faults = lambda request: "429"
    elif case == "network":
        hub.close()
    with pytest.raises((InputError, storage.StorageError), match=reason) as caught:
        open_dataset(source).open("x" if case == "file" else "lines.jsonl").read()
    assert exit_status(caught.value) == status
    assert "\n" not in str(caught.value)

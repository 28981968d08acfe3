"""Clips for the tests of the reader and of prepare; makes the reference importable."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torchvision_ops  # noqa: F401  before anything that imports torchvision
from clips import GOOD
from prepare_fixtures import job, pack_tar, swift
from stream_fixtures import write_clip

from avocado_jax.data import prepare as module
from avocado_jax.data.decode import read_media
from avocado_jax.data.make_shard import make_shard
from avocado_jax.data.prepare import prepare
from avocado_jax.data.reader import ClipReader


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`clip(name)` is the path of a valid clip, written on first use."""
    folder = tmp_path_factory.mktemp("clips")

    def made(name: str) -> Path:
        path = folder / name
        return path if path.exists() else GOOD[name](path)

    return made


@pytest.fixture(scope="session")
def clip_bytes(tmp_path_factory) -> list[bytes]:
    folder = tmp_path_factory.mktemp("clip_bytes")
    return [write_clip(folder / f"{number}.mov", 0.4, seed=number).read_bytes() for number in range(4)]


@pytest.fixture(scope="session")
def published(tmp_path_factory, clip_bytes) -> Path:
    """The layout of the training set: ten rows, two with one clip and one without; 9 clips in three parts."""
    folder = tmp_path_factory.mktemp("published")
    names = [f"videos/{number:02d}.mp4" for number in range(9)]
    rows = [swift(number, name) for number, name in enumerate(names[:8])]
    rows += [swift(8, "/data/authors/videos/03.mp4"), swift(9, "videos/lost.mp4")]
    (folder / "set.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for part in range(3):
        files = {name: clip_bytes[number % 4] for number, name in enumerate(names) if number // 3 == part}
        pack_tar(folder / f"videos.part-{part:03d}.tar.gz", {"README": b"clips"} | files)
    assert prepare(job(folder, folder / "whole"), 2, 0.2).complete
    return folder


@pytest.fixture
def in_process(monkeypatch):
    """Make shards and read clips in this process, which is fast and can be stopped at any point."""

    def run(job, source, tasks, workers):
        for task in tasks:
            make_shard(job, source._replace(manifests=[], parts=[]), task)
            if task.folder:
                shutil.rmtree(task.folder)
            yield task.name

    monkeypatch.setattr(module, "run_tasks", run)
    monkeypatch.setattr(ClipReader, "read", lambda self, path, reading: read_media(path, reading))

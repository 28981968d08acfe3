"""A random checkpoint and clips of AVWorld for `evaluate`."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from evaluate_runs import CLIPS

from avocado_jax.__main__ import main
from avocado_jax.models.config import SIZES, TINY

WRITE_CHECKPOINT = Path(__file__).parents[2] / "launch" / "random_checkpoint.py"
SMALL = replace(
    TINY,
    audio=replace(TINY.audio, layers=1),
    vision=replace(TINY.vision, layers=1, full_layers=(0,)),
    text=replace(TINY.text, layers=1),
)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A random checkpoint that reads small frames unscaled. One layer a tower: compilation dominates these tests."""
    folder = tmp_path_factory.mktemp("evaluate") / "hf"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "tiny", SMALL)
        patch.setattr(sys, "argv", ["random_checkpoint.py", str(folder)])
        assert runpy.run_path(str(WRITE_CHECKPOINT))["main"]() == 0
    (folder / "reading.json").write_text('{"fewest_pixels": 784}')
    return folder


@pytest.fixture(scope="session")
def world_clips(tmp_path_factory):
    """Clips that pad to one shape (a property of this seed), so that all tests share one program."""
    out = tmp_path_factory.mktemp("world") / "out"
    options = ["--clips", str(CLIPS), "--seed", "65", "--level", "0", "--workers", "1"]
    assert main(["world", str(out), *options]) == 0
    return out


@pytest.fixture
def world(world_clips, tmp_path):
    """A new folder with these clips, without captions."""
    folder = tmp_path / "world"
    folder.mkdir()
    (folder / "clips").symlink_to(world_clips / "clips")
    (folder / "clips.jsonl").write_bytes((world_clips / "clips.jsonl").read_bytes())
    return folder

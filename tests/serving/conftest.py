"""Fixtures: a media root, and a server for all tests of a module."""

import os

import pytest
from clips import GOOD
from running_server import KEY, running


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A media root with a clip, links and other files; a clip outside of it."""
    folder = tmp_path_factory.mktemp("served")
    inside, outside = folder / "root", folder / "outside"
    (inside / "sub").mkdir(parents=True)
    outside.mkdir()
    GOOD["plain.mp4"](inside / "sub" / "a clip.mp4")
    (outside / "clip.mp4").write_bytes((inside / "sub" / "a clip.mp4").read_bytes())
    (inside / "link.mp4").symlink_to(outside / "clip.mp4")
    (inside / "folder").symlink_to(outside)
    (inside / "within.mp4").symlink_to("sub/a clip.mp4")
    (inside / "loop.mp4").symlink_to("loop.mp4")
    os.mkfifo(inside / "pipe.mp4")
    (folder / "root-twin").mkdir()
    (folder / "root-twin" / "clip.mp4").write_bytes((outside / "clip.mp4").read_bytes())
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{outside}/clip.mp4\n#EXT-X-ENDLIST\n"
    (inside / "list.m3u8").write_text(playlist)
    (inside / "list.mp4").write_text(playlist)
    (inside / "concat.mp4").write_text(f"ffconcat version 1.0\nfile {outside}/clip.mp4\n")
    (inside / "empty.mp4").write_bytes(b"")
    (inside / "noise.mp4").write_bytes(bytes(range(256)) * 40)
    (inside / "cut.mp4").write_bytes((outside / "clip.mp4").read_bytes()[:5000])
    return inside


@pytest.fixture(scope="module")
def server(root):
    with running("--root", root, "--key", KEY, "--requests", 8) as made:
        yield made

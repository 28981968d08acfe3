"""Reader processes: a crash, a timeout or an error fails one clip only."""

import os
import time
from pathlib import Path

import clips
import numpy as np
import pytest
from media_kinds import write

from avocado_jax.data.decode import read_media
from avocado_jax.data.media import Reading
from avocado_jax.data.reader import ClipReader
from avocado_jax.errors import InputError

READING = Reading(fewest_pixels=28 * 28 * 4)


class Abort(Reading):
    """Ends the process that unpickles it, like a crash of a decoder."""

    def __reduce__(self):
        return os.abort, ()


class Sleep(Reading):
    """Blocks the process that unpickles it, like an endless clip."""

    def __reduce__(self):
        return time.sleep, (60,)


def test_clip_that_kills_its_reader_fails_alone(tmp_path: Path):
    path = write(tmp_path / "good.mp4", seconds=1.0)
    with ClipReader(seconds=20.0) as reader:
        with pytest.raises(InputError, match=r"deadly.mp4: the process that read it died \(SIGABRT\)"):
            reader.read("deadly.mp4", Abort())
        media = reader.read(path, READING)
        with pytest.raises(InputError, match=r"missing.mp4: no such file"):
            reader.read(tmp_path / "missing.mp4", READING)
        (tmp_path / "notes.txt").write_text("words\n" * 99)
        with pytest.raises(InputError, match=r"notes.txt: not a video"):
            reader.read(tmp_path / "notes.txt")
        assert reader.probe(path, READING).seconds == pytest.approx(1.0, abs=0.05)
    np.testing.assert_array_equal(media.frames, read_media(path, READING).frames)


def test_clip_that_exceeds_the_timeout_fails_alone(tmp_path: Path):
    path = clips.write(tmp_path / "good.mp4")
    with ClipReader(seconds=3.0) as reader:
        with pytest.raises(InputError, match=r"endless.mp4: took longer than 3 s"):
            reader.read("endless.mp4", Sleep())
        assert len(reader.read(path, READING).frames) == 4

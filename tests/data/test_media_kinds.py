"""The clip reader on clips that were cut, joined, recorded or damaged in common ways: frames, times, sound, errors."""

import inspect
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import media_kinds
import numpy as np
import pytest

from avocado_jax.data import container
from avocado_jax.data.decode import read_media
from avocado_jax.data.media import Reading
from avocado_jax.errors import InputError

READING = Reading(fewest_pixels=28 * 28 * 4)


def burst_time(samples: np.ndarray) -> float:
    """Time in seconds at which the loud part begins."""
    return float(np.argmax(np.abs(samples) > 0.3)) / 16_000


@pytest.mark.parametrize(
    ("name", "kind"),
    [*media_kinds.FAST.items(), *(pytest.param(*one, marks=pytest.mark.slow) for one in media_kinds.SLOW.items())],
)
def test_read_each_kind_of_clip(tmp_path: Path, name: str, kind: media_kinds.Kind):
    path = tmp_path / name
    kind.write(path)
    if kind.refused:
        with pytest.raises(InputError, match=kind.refused) as caught:
            read_media(path, READING)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        return
    media = read_media(path, READING)
    assert media.seconds == pytest.approx(kind.seconds, abs=0.12)
    assert (np.diff(media.times) > 0).all()
    assert media.times[0] == pytest.approx(kind.first, abs=0.05)
    if name.startswith("mirrored"):
        row, column = (size // 2 for size in media.frames.shape[1:3])
        quarters = [
            [media.frames[:, rows, columns].mean() < 60 for columns in (slice(column - 8), slice(column + 8, None))]
            for rows in (slice(row - 8), slice(row + 8, None))
        ]
        assert quarters == [[False, False], [True, False]]
    else:
        shown = media.times - kind.first + kind.begins
        expected = media_kinds.brightness(np.where(shown >= 2.0, shown - 2.0, shown) if kind.falls else shown)
        brightness = media.frames.mean(axis=(1, 2, 3))
        near_joint = np.abs(shown - 2.0) < 0.06 if kind.falls else np.zeros(len(shown), bool)
        assert (np.abs(brightness - expected) < 8)[~near_joint].all(), (brightness, expected)
    warnings = "; ".join(media.warnings)
    assert re.search(kind.warning, warnings) if kind.warning else not warnings
    for align, burst in ((False, kind.burst), (True, kind.aligned)):
        if burst is not None:
            samples = read_media(path, replace(READING, align_sound=align)).samples
            assert burst_time(samples) == pytest.approx(burst, abs=0.06)


def test_sound_with_changing_sample_rate(tmp_path: Path):
    samples = read_media(media_kinds.rate_changes(tmp_path / "rates.ts"), READING).samples
    assert len(samples) / 16_000 == pytest.approx(4.0, abs=0.2)
    for part in (samples[:32_000], samples[-32_000:]):
        loud = part[np.abs(part).argmax() - 800 :][:1600]
        peak = np.abs(np.fft.rfft(loud, 16_000)).argmax()
        assert peak == pytest.approx(1000, abs=15)


def test_sound_beyond_the_limit_is_reported(tmp_path: Path):
    path = media_kinds.write(tmp_path / "long.mkv", sound=4.0)
    media = read_media(path, replace(READING, sound_seconds=2))
    assert len(media.samples) == 32_000
    assert media.warnings == ("only the first 2 s of its sound are used",)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("a\nb.mp4", "a\\nb.mp4: no such file"),
        ("a\0b.mp4", "NUL"),
        ("\udce9.mp4", "\\udce9.mp4: no such file"),
        ("x" * 300 + ".mp4", "name too long"),
        ("loop.mp4", "symbolic links"),
    ],
)
def test_unusual_file_names_are_one_line_errors(tmp_path: Path, name: str, reason: str):
    (tmp_path / "loop.mp4").symlink_to(tmp_path / "loop.mp4")
    with pytest.raises(InputError) as caught:
        read_media(tmp_path / name, READING)
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_stream_that_appears_later():
    """PyAV raises IndexError after the last packet of such a file; no packet is lost."""

    def demux():
        yield from "abc"
        raise IndexError("list index out of range")

    assert list(inspect.unwrap(container._demux)(SimpleNamespace(demux=demux))) == ["a", "b", "c"]


def test_transport_stream_whose_sound_begins_late(tmp_path):
    """Its format is not known when the file is opened."""
    path = media_kinds.write(tmp_path / "late.ts", seconds=24.0, sound=4.0, sound_late=18.0)
    media = read_media(path, replace(READING, align_sound=True))
    assert burst_time(media.samples) == pytest.approx(20.0, abs=0.1)
    assert "its sound starts 1" in media.warnings[0]

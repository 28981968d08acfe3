"""Frame selection, sizes, resizing, windows and log-mel against the code of the reference."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from qwen_omni_utils.v2_5.vision_process import smart_nframes, smart_resize
from torchvision.transforms.functional import InterpolationMode
from torchvision.transforms.functional import resize as torch_resize
from transformers import Qwen2VLVideoProcessor, WhisperFeatureExtractor
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import _get_feat_extract_output_lengths
from transformers.vision_utils import get_vision_window_index

from avocado_jax.data.features import (
    audio_tokens,
    choose_frames,
    frame_pixels,
    frame_size,
    log_mel,
    mel_chunks,
    resize,
    windows,
)
from avocado_jax.errors import InputError
from avocado_jax.models.config import VisionConfig

VISION = VisionConfig()
LEAST, MOST = 128 * 28 * 28, 768 * 28 * 28


def random_pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, np.uint8)


# Frame selection


@settings(max_examples=300)
@given(
    st.integers(2, 30_000),
    st.sampled_from([1.0, 7.5, 12.0, 23.976, 24.0, 25.0, 29.97, 30.0, 59.94, 60.0, 120.0]),
    st.sampled_from([0.5, 1.0, 2.0, 3.0]),
    st.integers(1, 9),
    st.sampled_from([2, 17, 128, 768]),
)
def test_frame_indices_equal_the_reference(total: int, rate: float, fps: float, fewest: int, most: int):
    fewest = min(fewest, most)
    request = {"fps": fps, "min_frames": fewest, "max_frames": min(most, total)}
    count = smart_nframes(request, total, rate)
    theirs = torch.linspace(0, total - 1, count).round().long().tolist()
    assert choose_frames(total, rate, fps, fewest, most).tolist() == theirs


def test_frame_indices_equal_linspace_for_any_count():
    for total in (100, 333, 1799, 1800, 23_023):
        for count in range(2, min(total, 768) + 1, 2):
            theirs = torch.linspace(0, total - 1, count).round().long().tolist()
            assert choose_frames(total, 1.0, count / total + 1e-9, 2).tolist() == theirs


def test_too_few_frames_are_repeated():
    assert choose_frames(1, 25.0).tolist() == [0, 0]
    assert choose_frames(2, 25.0).tolist() == [0, 1]
    assert choose_frames(3, 25.0).tolist() == [0, 2]


# Sizes


@pytest.mark.parametrize("frames", [2, 4, 10, 60, 66, 120, 240, 380, 382, 768])
@pytest.mark.parametrize("budget", [(20_070_400, 401_408), (90_316_800, 10**9), (3_000_000, 150_000)])
def test_pixel_budget_per_frame(frames: int, budget: tuple[int, int]):
    clip, cap = budget
    theirs = min(max(min(MOST, clip / frames * 2), int(LEAST * 1.05)), cap)  # fetch_video
    assert frame_pixels(frames, clip=clip, cap=cap) == theirs


@pytest.mark.parametrize(("frames", "size"), [(60, (448, 840)), (120, (420, 756)), (240, (280, 532))])
def test_size_of_720p_under_the_papers_budget(frames: int, size: tuple[int, int]):
    assert frame_size(720, 1280, LEAST, frame_pixels(frames)) == size


@settings(max_examples=500)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(2, 768), st.sampled_from([LEAST, 28 * 28, 56 * 56]))
def test_size_equals_the_reference(height: int, width: int, frames: int, least: int):
    most = frame_pixels(frames, least)
    if max(height, width) / min(height, width) > 200:
        with pytest.raises(InputError, match=f"{width}x{height} is narrower than 1:200"):
            frame_size(height, width, least, most)
    else:
        assert frame_size(height, width, least, most) == smart_resize(height, width, 28, least, most)


# Resizing


@pytest.mark.parametrize("size", [(64, 96), (720, 1280), (37, 1001), (1080, 608), (280, 392), (28, 28), (1, 1)])
@pytest.mark.parametrize("target", [(280, 392), (448, 840), (56, 28)])
@pytest.mark.parametrize("smooth", [False, True])
def test_resize_equals_torchvision(size: tuple[int, int], target: tuple[int, int], smooth: bool):
    if smooth:
        image = 127.5 + 127.5 * np.sin(np.add.outer(np.arange(size[0]) / 9, np.arange(size[1]) / 7))
        image = np.stack([image, 255 - image, image / 2], axis=-1).astype(np.uint8)
    else:
        image = random_pixels(*size, 3)
    picture = torch.from_numpy(image).permute(2, 0, 1)
    theirs = torch_resize(picture, list(target), interpolation=InterpolationMode.BICUBIC, antialias=True)
    theirs, ours = theirs.permute(1, 2, 0).numpy().astype(int), resize(image, *target)
    assert ours.dtype == np.uint8
    assert np.abs(ours - theirs).max() <= 1
    assert (ours != theirs).mean() < 2e-3


# Windows


@pytest.mark.parametrize(
    ("frames", "height", "width"),
    [(2, 112, 112), (4, 280, 392), (3, 28, 28), (5, 140, 84), (2, 28, 364), (6, 224, 252)],
)
def test_windows_contain_the_patches_of_the_reference(frames: int, height: int, width: int):
    pixels = random_pixels(frames, height, width, 3)
    processor = Qwen2VLVideoProcessor(do_resize=False, do_rescale=False, do_normalize=False, do_convert_rgb=False)
    theirs = processor([torch.from_numpy(pixels).permute(0, 3, 1, 2)], return_tensors="pt")
    grid = theirs["video_grid_thw"]
    patches = theirs["pixel_values_videos"].numpy()
    order, bounds = get_vision_window_index(grid, 2, 112, 14)

    ours = windows(pixels, VISION)
    count, rows, columns = grid[0].tolist()
    assert ours.patches.shape == (count, *ours.valid.shape, VISION.patch_size)
    # In window order: the slots that hold a patch, one after the other
    in_windows = patches.reshape(-1, 4, VISION.patch_size)[order].reshape(count, -1, VISION.patch_size)
    np.testing.assert_array_equal(ours.patches[:, ours.valid], in_windows)
    assert ours.valid.sum(axis=1).tolist() * count == np.diff(bounds).tolist()
    assert not ours.patches[:, ~ours.valid].any()
    # In raster order: through `order`, as the merger's output is put back
    cells = ours.patches.reshape(count, -1, 4 * VISION.patch_size)[:, ours.order]
    np.testing.assert_array_equal(cells.reshape(-1, VISION.patch_size), patches)
    # Row and column of each slot
    places = np.stack(np.mgrid[:rows, :columns], -1).reshape(rows // 2, 2, columns // 2, 2, 2).transpose(0, 2, 1, 3, 4)
    np.testing.assert_array_equal(ours.grid.reshape(-1, 4, 2)[ours.order], places.reshape(-1, 4, 2))


def test_windows_of_another_size():
    windowed = windows(random_pixels(2, 84, 56, 3), replace(VISION, window=56))
    assert windowed.valid.shape == (2, 16)
    assert windowed.valid.sum(axis=1).tolist() == [16, 8]


# Sound

EXTRACTOR = WhisperFeatureExtractor(feature_size=128, chunk_length=300, n_fft=400, hop_length=160, sampling_rate=16_000)


def random_sound(samples: int) -> np.ndarray:
    time = np.arange(samples) / 16_000
    loud = np.random.default_rng(samples).standard_normal(samples) * 0.05
    return (0.3 * np.sin(2 * np.pi * 440 * time) * np.exp(-time) + loud * (np.sin(time) > 0)).astype(np.float32)


def assert_mel_equals_reference(samples: np.ndarray) -> None:
    theirs = EXTRACTOR(
        samples, sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="np"
    )
    valid = int(theirs["attention_mask"].sum())
    ours = log_mel(samples)
    assert ours.shape == (valid, 128)
    assert ours.dtype == np.float32
    assert np.abs(ours - theirs["input_features"][0, :, :valid].T).max() < 1e-4


@pytest.mark.parametrize("samples", [1, 2, 159, 160, 161, 399, 400, 401, 16_000, 32_323, 81_000])
def test_log_mel_equals_the_reference(samples: int):
    assert_mel_equals_reference(random_sound(samples))


def test_log_mel_of_silence():
    assert_mel_equals_reference(np.zeros(5000, np.float32))
    assert_mel_equals_reference(np.full(5000, 0.5, np.float32))
    assert log_mel(np.zeros(0, np.float32)).shape == (0, 128)


@pytest.mark.parametrize("more", [-401, -400, -399, -1, 0, 1, 50_000])
def test_log_mel_at_the_length_limit_of_the_reference(more: int, monkeypatch: pytest.MonkeyPatch):
    """The limit of the reference, 300 s, is 4 s here."""
    short = WhisperFeatureExtractor(feature_size=128, chunk_length=4, n_fft=400, hop_length=160, sampling_rate=16_000)
    samples = random_sound(64_000 + more)
    theirs = short(samples, sampling_rate=16_000, return_attention_mask=True, return_tensors="np")
    valid = int(theirs["attention_mask"].sum())
    ours = log_mel(samples, seconds=4)
    assert ours.shape == (valid, 128)
    assert np.abs(ours - theirs["input_features"][0, :, :valid].T).max() < 1e-4


@pytest.mark.parametrize("more", [-1, 0, 777])
def test_log_mel_of_five_minutes(more: int):
    assert_mel_equals_reference(random_sound(4_800_000 + more))


def test_number_of_sound_tokens():
    for frames in range(1, 3001):
        assert audio_tokens(frames) == _get_feat_extract_output_lengths(frames)
    assert audio_tokens(0) == 0
    assert audio_tokens(30_000) == 7500


@pytest.mark.parametrize("frames", [0, 1, 199, 200, 201, 501])
def test_sound_is_padded_to_chunks(frames: int):
    mel = np.random.default_rng(0).random((frames, 128), np.float32)
    chunks, lengths = mel_chunks(mel, 200)
    assert chunks.shape == (-(-frames // 200), 200, 128)
    assert lengths.dtype == np.int32
    np.testing.assert_array_equal(np.concatenate([mel[:0], *(c[:n] for c, n in zip(chunks, lengths))]), mel)
    assert not any(c[n:].any() for c, n in zip(chunks, lengths))

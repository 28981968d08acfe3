"""Order of media tokens in a prompt and their TMRoPE ids, against the processor and model of the reference."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5OmniProcessor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniPreTrainedModelForConditionalGeneration as Reference,
)

from avocado_jax.data.features import audio_tokens
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.positions import chunks, interleave
from avocado_jax.data.prompt import Prompt
from avocado_jax.data.rows import Row, make_row
from avocado_jax.models.config import TINY

IDS = TINY.tokens


class Model:
    """The attributes that `get_rope_index` of the reference model needs."""

    spatial_merge_size = 2
    config = SimpleNamespace(
        image_token_id=IDS.image,
        video_token_id=IDS.video,
        audio_token_id=IDS.audio,
        vision_start_token_id=IDS.vision_start,
        audio_start_token_id=IDS.audio_start,
        position_id_per_seconds=25,
        seconds_per_chunk=2,
    )
    get_rope_index = Reference.get_rope_index
    get_llm_pos_ids_for_vision = Reference.get_llm_pos_ids_for_vision
    get_chunked_index = Reference.get_chunked_index


class Processor:
    """The attributes that `replace_video_with_audio_token` of the reference needs; tokens are single letters."""

    audio_bos_token, audio_eos_token, audio_token, video_token = "<", ">", "A", "V"
    video_processor = SimpleNamespace(merge_size=2)
    get_chunked_index = Qwen2_5OmniProcessor.get_chunked_index
    replace_video_with_audio_token = Qwen2_5OmniProcessor.replace_video_with_audio_token


def row(grid: tuple[int, int, int], mel: int, seconds: float, before: int = 3, after: int = 4) -> Row:
    """A row of a clip with `grid` temporal patches, rows and columns of patches, and `mel` frames of sound."""
    frames = np.zeros((2 * grid[0], 14 * grid[1], 14 * grid[2], 3), np.uint8)
    media = Media(frames, np.zeros(160 * mel, np.float32) if mel else None, 1.0)
    prompt = Prompt(list(range(1, before + 1)), list(range(100, 100 + after)))
    return make_row(media, prompt, TINY, Reading(fps=2 / seconds))


def reference(grid: tuple[int, int, int], mel: int, seconds: float, before: int, after: int) -> tuple:
    """Prompt ids, positions [P, 3] and the first position of generation."""
    if audio_tokens(mel):
        sounds = {"num_audio_tokens": [audio_tokens(mel)]}
        pictures = {"video_grid_thw": np.array([grid]), "video_second_per_grid": [seconds]}
        placeholders = Processor().replace_video_with_audio_token(
            pictures, 0, sounds, 0, position_id_per_seconds=25, seconds_per_chunk=2.0
        )
    else:
        placeholders = "V" * (grid[0] * grid[1] * grid[2] // 4)
    names = {"<": IDS.audio_start, ">": IDS.audio_end, "A": IDS.audio, "V": IDS.video}
    media = [IDS.vision_start, *(names[letter] for letter in placeholders), IDS.vision_end]
    ids = [*range(1, before + 1), *media, *range(100, 100 + after)]
    positions, _ = Model().get_rope_index(
        torch.tensor([ids]),
        video_grid_thw=torch.tensor([grid]),
        use_audio_in_video=bool(audio_tokens(mel)),
        audio_seqlens=torch.tensor([mel]),
        second_per_grids=torch.tensor([seconds]),
    )
    return ids, positions[:, 0].T.numpy()


def assert_equals_reference(
    grid: tuple[int, int, int], mel: int, seconds: float, before: int = 3, after: int = 4
) -> Row:
    """Assert that a row equals the reference. Returns the row."""
    made = row(grid, mel, seconds, before, after)
    ids, positions = reference(grid, mel, seconds, before, after)
    assert made.prompt_ids.tolist() == ids
    assert made.clip.tokens.tolist() == ids[:-1]
    assert made.clip.first == ids[-1]
    np.testing.assert_array_equal(made.clip.positions, positions[:-1])
    assert positions[-1].tolist() == [made.clip.start] * 3
    return made


@pytest.mark.parametrize("seconds", [1.0, 4.0, 0.5])
@pytest.mark.parametrize("mel", [0, 1, 2, 3, 199, 201, 499, 500, 1777])
@pytest.mark.parametrize("grid", [(1, 2, 2), (2, 4, 6), (6, 4, 4), (7, 10, 14), (30, 2, 4)])
def test_ids_and_positions_equal_the_reference(grid: tuple[int, int, int], mel: int, seconds: float):
    assert_equals_reference(grid, mel, seconds)


@settings(max_examples=150)
@given(
    st.tuples(st.integers(1, 40), st.integers(1, 6), st.integers(1, 6)),
    st.integers(0, 6000),
    st.sampled_from([1.0, 4.0, 0.5, 2.0, 3.0, 0.25, 0.8, 1.6]),
    st.integers(0, 30),
    st.integers(1, 30),
)
@example((1, 1, 1), 6000, 1.0, 0, 1)  # sound that is much longer than the picture
@example((40, 1, 1), 3, 4.0, 0, 1)  # and vice versa
def test_ids_and_positions_of_any_clip_equal_the_reference(
    cells: tuple, mel: int, seconds: float, before: int, after: int
):
    assert_equals_reference((cells[0], 2 * cells[1], 2 * cells[2]), mel, seconds, before, after)


def test_positions_after_the_media_continue_from_the_last_chunk():
    made = assert_equals_reference((6, 4, 4), 500, 1.0)  # the last video token is at 129, the last sound token at 128
    closing = made.prompt_ids.tolist().index(IDS.audio_end)
    assert made.clip.positions[closing].tolist() == [129] * 3
    assert made.clip.positions[:, 0].max() == 132
    assert made.clip.positions[made.clip.tokens == IDS.video, 0].max() == 129


def test_frames_longer_than_a_chunk_are_split():
    times = np.repeat([0, 100, 200], 4)
    assert chunks(times, 50) == [(0, 4), (4, 5), (5, 8), (8, 9), (9, 12)]
    assert chunks(times, 50) == Processor().get_chunked_index(times, 50)
    assert chunks(times, 50) == Model().get_chunked_index(torch.from_numpy(times), 50, 0)


@settings(max_examples=200)
@given(st.lists(st.integers(0, 60), max_size=60), st.integers(1, 60))
def test_chunks_equal_the_reference(steps: list[int], length: int):
    times = np.cumsum(steps, dtype=int)
    assert chunks(times, length) == Processor().get_chunked_index(times, length)


def test_media_tokens_index_their_embeddings():
    """The source of each media token is its embedding in raster order; each is used once."""
    order = interleave((5, 3, 2), 130, 1.0, TINY)
    assert sorted(order.source.tolist()) == list(range(5 * 3 * 2 + 130))
    pictures = order.source < 30
    assert (np.diff(order.source[pictures]) > 0).all()
    assert (np.diff(order.source[~pictures]) > 0).all()
    time, cell_row, column = order.positions[pictures].T
    np.testing.assert_array_equal(time, np.repeat(np.arange(5) * 25, 6))
    np.testing.assert_array_equal(cell_row, np.tile([0, 0, 1, 1, 2, 2], 5))
    np.testing.assert_array_equal(column, np.tile([0, 1], 15))
    np.testing.assert_array_equal(order.positions[~pictures], np.arange(130)[:, None].repeat(3, 1))

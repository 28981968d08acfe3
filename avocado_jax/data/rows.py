"""Build the model's input arrays of a clip and its prompt, and pad them to one shape."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from avocado_jax.data.features import audio_tokens, log_mel, mel_chunks, windows
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.positions import interleave
from avocado_jax.data.prompt import Prompt
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.typing import Array, Clip, Float, Int


class Row(NamedTuple):
    """One clip, unpadded."""

    clip: Clip  # without the row axis
    prompt_ids: Int[Array, "P+1"]  # the complete prompt with expanded media tokens


class Shape(NamedTuple):
    """Sizes that rows are padded to."""

    tokens: int  # prompt tokens without the last one
    patches: int  # temporal patches
    windows: int  # windows per temporal patch
    chunks: int  # audio chunks


def make_row(media: Media, prompt: Prompt, config: ThinkerConfig, reading: Reading = Reading()) -> Row:
    """Compute the features, prompt ids, media order and TMRoPE positions of one clip."""
    vision, ids = config.vision, config.tokens
    picture = windows(media.frames, vision)
    mel, sound_tokens = _sound(media, config)
    patches = len(picture.patches)
    grid = (patches, *(size // vision.patch // vision.merge for size in media.frames.shape[1:3]))
    order = interleave(grid, sound_tokens, vision.temporal_patch / reading.fps, config)

    # The prompt has visual tokens in raster order; the encoder returns them in slot order, followed by audio tokens.
    per_patch = picture.valid.size // vision.merge**2
    slots = (np.arange(patches)[:, None] * per_patch + picture.order).reshape(-1)
    slots = np.concatenate([slots, patches * per_patch + np.arange(sound_tokens)])

    opening = [ids.vision_start] + [ids.audio_start] * bool(sound_tokens)
    closing = [ids.audio_end] * bool(sound_tokens) + [ids.vision_end]
    media_ids = np.where(order.source < len(slots) - sound_tokens, ids.video, ids.audio)
    tokens = np.concatenate([prompt.before, opening, media_ids, closing, prompt.after]).astype(np.int32)

    # The two opening tokens share one position, as do the two closing tokens.
    opens = len(prompt.before)
    closes = opens + 1 + order.last_chunk + 1
    positions = np.concatenate(
        [
            _line(0, opens),
            np.full((len(opening), 3), opens),
            order.positions + opens + 1,
            np.full((len(closing), 3), closes),
            _line(closes + 1, len(prompt.after)),
        ]
    ).astype(np.int32)
    where = np.full(len(tokens), -1)
    first = opens + len(opening)
    where[first : first + len(order.source)] = slots[order.source]

    clip = Clip(
        tokens=tokens[:-1],
        positions=positions[:-1],
        length=np.int32(len(tokens) - 1),
        media=where[:-1].astype(np.int32),
        first=tokens[-1],
        start=positions[-1, 0],
        patches=picture.patches,
        patch_grid=picture.grid,
        patch_valid=picture.valid,
        mel=(chunked := mel_chunks(mel, 2 * config.audio.window))[0],
        mel_length=chunked[1],
    )
    return Row(clip, tokens)


def text_row(ids: Sequence[int]) -> Row:
    """Build a row from a text prompt without media. It can be batched only with other text rows."""
    tokens = np.asarray(ids, np.int32)
    many = len(tokens) - 1
    clip = Clip(
        tokens=tokens[:-1],
        positions=_line(0, many).astype(np.int32),
        length=np.int32(many),
        media=np.full(many, -1, np.int32),
        first=tokens[-1],
        start=np.int32(many),
        patches=np.zeros((0, 1, 4, 0), np.uint8),
        patch_grid=np.zeros((1, 4, 2), np.int32),
        patch_valid=np.zeros((1, 4), bool),
        mel=np.zeros((0, 0, 0), np.float32),
        mel_length=np.zeros(0, np.int32),
    )
    return Row(clip, tokens)


def _line(first: int, count: int) -> Int[Array, "N 3"]:
    return np.repeat(np.arange(first, first + count)[:, None], 3, axis=1)


def _sound(media: Media, config: ThinkerConfig) -> tuple[Float[Array, "frames M"], int]:
    """The log-mel spectrogram and its number of tokens. Sound that is too short for one token is dropped."""
    bins = config.audio.mel_bins
    mel = np.zeros((0, bins), np.float32) if media.samples is None else log_mel(media.samples, bins)
    count = audio_tokens(len(mel))
    return mel[: len(mel) if count else 0], count


def shape_of(clip: Clip) -> Shape:
    """The sizes of one clip."""
    return Shape(len(clip.tokens), len(clip.patches), len(clip.patch_valid), len(clip.mel))


def fit(shapes: list[Shape]) -> Shape:
    """The smallest shape that fits all of `shapes`."""
    return Shape(*(max(sizes) for sizes in zip(*shapes)))


def rounded(shape: Shape, bits: int = 3) -> Shape:
    """Round each size up to `bits` leading bits, so that few distinct shapes occur. 3 bits add at most 1/4."""

    def round_up(size: int) -> int:
        unit = 1 << max(0, size.bit_length() - bits)
        return -(-size // unit) * unit

    return Shape(*map(round_up, shape))


def stack(clips: list[Clip], shape: Shape) -> Clip:
    """Pad clips to one shape and stack them.

    Padding tokens have position 1, as in the reference; empty slots are zero. The media index is adjusted to the
    padded encoder outputs.

    Raises:
        InputError: a clip is larger than `shape`.
    """
    return Clip(*(np.stack(leaves) for leaves in zip(*(_padded(clip, shape) for clip in clips))))


def _padded(clip: Clip, shape: Shape) -> Clip:
    have = shape_of(clip)
    if any(size > limit for size, limit in zip(have, shape)):
        raise InputError(f"a clip of {have} does not fit {shape}")
    cells = clip.patches.shape[2] // 4  # merged cells of a window
    slots = cells * have.windows  # visual tokens of a temporal patch
    padded = cells * shape.windows
    sound = clip.media >= have.patches * slots
    media = np.where(
        sound,
        clip.media - have.patches * slots + shape.patches * padded,
        clip.media // slots * padded + clip.media % slots,
    )
    media = np.where(clip.media < 0, -1, media)

    def pad(array: np.ndarray, *sizes: int, value: int = 0) -> np.ndarray:
        after = [size - n for size, n in zip(sizes, array.shape)] + [0] * (array.ndim - len(sizes))
        return np.pad(array, [(0, extra) for extra in after], constant_values=value)

    return clip._replace(
        tokens=pad(clip.tokens, shape.tokens),
        positions=pad(clip.positions, shape.tokens, value=1),
        media=pad(media, shape.tokens, value=-1).astype(np.int32),
        patches=pad(clip.patches, shape.patches, shape.windows),
        patch_grid=pad(clip.patch_grid, shape.windows),
        patch_valid=pad(clip.patch_valid, shape.windows),
        mel=pad(clip.mel, shape.chunks),
        mel_length=pad(clip.mel_length, shape.chunks),
    )

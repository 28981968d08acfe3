"""Convert pixels and samples to encoder inputs: frame selection, sizes, resizing, windows of patches, log-mel."""

import math
from functools import lru_cache
from typing import NamedTuple

import librosa
import numpy as np
import scipy.sparse

from avocado_jax.errors import InputError
from avocado_jax.models.config import VisionConfig
from avocado_jax.typing import Array, Bool, Float, Int, Shaped


def choose_frames(
    total: int, rate: float, fps: float = 2.0, fewest: int = 4, most: int = 768, multiple: int = 2
) -> Int[Array, "N"]:
    """Choose the frames to read of `total` frames at `rate` per second (qwen-omni-utils' smart_nframes).

    The indices are evenly spaced from the first to the last frame, with ties rounded to even. Their number is a
    multiple of `multiple`. A clip of fewer than `multiple` frames repeats its last frame; the reference fails.
    """
    if total < multiple:
        return np.minimum(np.arange(multiple), total - 1)
    fewest = max(-(-fewest // multiple), 1) * multiple
    wanted = min(max(total / rate * fps, fewest), max(most, multiple), total)
    # As in torch.linspace: an fp32 step from both ends, each point rounded to fp32 once (a fused multiply-add).
    count = math.floor(wanted / multiple) * multiple
    step = float(np.float32(total - 1) / np.float32(max(count - 1, 1)))
    steps = np.arange(count)
    points = np.where(steps < count // 2, step * steps, total - 1 - step * (count - 1 - steps))
    return np.round(points.astype(np.float32)).astype(np.int64)


def frame_pixels(
    frames: int,
    least: int = 128 * 28 * 28,
    most: int = 768 * 28 * 28,
    clip: int = 20_070_400,
    cap: int = 401_408,
    multiple: int = 2,
) -> float:
    """The maximum pixels of each of `frames` frames: the clip's budget divided by the frames, within bounds.

    `clip` is the budget of all frames and `cap` the limit of the request. The defaults are AVoCaDO's.
    """
    return min(max(min(most, clip / frames * multiple), int(least * 1.05)), cap)


def frame_size(
    height: int, width: int, least: int, most: float, factor: int = 28, steepest: float = 200.0
) -> tuple[int, int]:
    """Choose the resized height and width: multiples of `factor`, between `least` and `most` pixels (smart_resize).

    Raises:
        InputError: the sides differ by more than a factor of `steepest`.
    """
    if max(height, width) / min(height, width) > steepest:
        raise InputError(f"a picture of {width}x{height} is narrower than 1:{steepest:g}")
    rows, columns = (max(factor, round(size / factor) * factor) for size in (height, width))
    if rows * columns > most:
        shrink = math.sqrt(height * width / most)
        rows, columns = (max(factor, math.floor(size / shrink / factor) * factor) for size in (height, width))
    elif rows * columns < least:
        grow = math.sqrt(least / (height * width))
        rows, columns = (math.ceil(size * grow / factor) * factor for size in (height, width))
    return rows, columns


@lru_cache(maxsize=64)
def _cubic(size: int, target: int) -> scipy.sparse.csr_array:
    """The antialiased cubic (a = -0.5) resampling from `size` to `target` samples, as a sparse matrix."""
    scale = size / target
    stretch = max(scale, 1.0)
    centre = (np.arange(target) + 0.5) * scale
    first = np.maximum((centre - 2 * stretch + 0.5).astype(int), 0)
    last = np.minimum((centre + 2 * stretch + 0.5).astype(int), size)
    taps = first[:, None] + np.arange((last - first).max())
    x = np.abs((taps - centre[:, None] + 0.5) / stretch)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    weights = np.where(x < 1, near, np.where(x < 2, far, 0)) * (taps < last[:, None])
    weights = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    rows = np.broadcast_to(np.arange(target)[:, None], taps.shape)
    kept = weights != 0
    return scipy.sparse.csr_array((weights[kept], (rows[kept], taps[kept])), shape=(target, size))


def resize(frame: Shaped[Array, "h w 3"], rows: int, columns: int) -> Shaped[Array, "rows columns 3"]:
    """Resize with antialiased bicubic interpolation, uint8 to uint8, rounded once at the end as in torchvision."""
    height, width, channels = frame.shape
    if (height, width) == (rows, columns):
        return frame
    down = _cubic(height, rows) @ frame.reshape(height, -1).astype(np.float32)
    across = down.reshape(rows, width, channels).transpose(1, 0, 2).reshape(width, -1)
    done = (_cubic(width, columns) @ across).reshape(columns, rows, channels).transpose(1, 0, 2)
    return np.round(np.clip(done, 0, 255)).astype(np.uint8)


class Windows(NamedTuple):
    """The frames of a clip as inputs of the vision encoder."""

    patches: Shaped[Array, "T W U X"]  # uint8 pixels; zero in empty slots
    grid: Int[Array, "W U 2"]  # row and column of each slot's patch
    valid: Bool[Array, "W U"]  # slots with a patch
    order: Int[Array, "rows*columns"]  # group of four slots of each merged cell, in raster order


def windows(frames: Shaped[Array, "N h w 3"], vision: VisionConfig) -> Windows:
    """Split resized frames into patches, in the order of the encoder's windows.

    The slots of a window are ordered by (cell row, cell column, row in the cell, column in the cell). A patch is
    flattened as (channel, frame, row, column). An odd last frame is repeated.
    """
    patch, merge, window = vision.patch, vision.merge, vision.window_cells
    if len(frames) % vision.temporal_patch:
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % vision.temporal_patch, axis=0)])
    count, height, width, channels = frames.shape
    rows, columns = height // patch // merge, width // patch // merge  # of merged cells
    high, wide = -(-rows // window), -(-columns // window)  # of windows
    padded = np.zeros((count, high * window * merge * patch, wide * window * merge * patch, channels), np.uint8)
    padded[:, :height, :width] = frames
    blocks = padded.reshape(
        count // vision.temporal_patch,
        vision.temporal_patch,
        high,
        window,
        merge,
        patch,
        wide,
        window,
        merge,
        patch,
        -1,
    )
    #       0 T, 1 frame, 2 high, 3 row, 4 merge, 5 patch, 6 wide, 7 column, 8 merge, 9 patch, 10 channel
    patches = blocks.transpose(0, 2, 6, 3, 7, 4, 8, 10, 1, 5, 9).reshape(
        blocks.shape[0], high * wide, (window * merge) ** 2, vision.patch_size
    )
    slots = np.stack(np.mgrid[: high * window * merge, : wide * window * merge], axis=-1)
    grid = slots.reshape(high, window, merge, wide, window, merge, 2).transpose(0, 3, 1, 4, 2, 5, 6)
    grid = grid.reshape(high * wide, -1, 2)
    valid = (grid < (rows * merge, columns * merge)).all(axis=-1)
    cells = np.arange(high * wide * window * window).reshape(high, wide, window, window).transpose(0, 2, 1, 3)
    order = cells.reshape(high * window, wide * window)[:rows, :columns].reshape(-1)
    return Windows(patches, grid.astype(np.int32), valid, order)


@lru_cache(maxsize=4)
def _mel_filters(rate: int, size: int, bins: int) -> Float[Array, "M F"]:
    return librosa.filters.mel(sr=rate, n_fft=size, n_mels=bins).astype(np.float32)


def log_mel(
    samples: Float[Array, "N"],
    bins: int = 128,
    rate: int = 16_000,
    size: int = 400,
    hop: int = 160,
    seconds: int = 300,
) -> Float[Array, "frames M"]:
    """Compute Whisper's log-mel spectrogram of a mono signal: ceil(N / hop) frames of at most `seconds` seconds.

    The reference pads every signal to `seconds`. Only the padding that influences the returned frames is computed here.
    """
    most = seconds * rate
    samples = np.asarray(samples[:most], np.float32)
    frames = -(-len(samples) // hop)
    padded = np.pad(samples, (0, min(size, most - len(samples))))
    padded = np.pad(padded, size // 2, mode="reflect")
    spectrum = librosa.stft(padded, n_fft=size, hop_length=hop, window="hann", center=False)[:, :frames]
    power = np.abs(spectrum) ** 2
    mel = np.log10(np.maximum(_mel_filters(rate, size, bins) @ power, 1e-10))
    return ((np.maximum(mel, mel.max(initial=-10.0) - 8.0) + 4.0) / 4.0).T.astype(np.float32)


def audio_tokens(frames: int) -> int:
    """The number of audio encoder tokens for a number of mel frames."""
    return max(0, ((frames - 1) // 2 + 1 - 2) // 2 + 1)


def mel_chunks(mel: Float[Array, "frames M"], chunk: int) -> tuple[Float[Array, "A U M"], Int[Array, "A"]]:
    """Split a spectrogram into chunks of `chunk` frames, zero-padded at the end; also return each chunk's frames."""
    count = -(-len(mel) // chunk)
    padded = np.pad(mel, ((0, count * chunk - len(mel)), (0, 0)))
    lengths = np.clip(len(mel) - chunk * np.arange(count), 0, chunk).astype(np.int32)
    return padded.reshape(count, chunk, mel.shape[1]), lengths

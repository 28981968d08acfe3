"""Interleave video and audio tokens in time, and compute the TMRoPE ids of a prompt (Qwen2.5-Omni, 2.1)."""

from typing import NamedTuple

import numpy as np

from avocado_jax.models.config import ThinkerConfig
from avocado_jax.typing import Array, Int


class Interleaved(NamedTuple):
    """The media tokens of a clip in the order of the prompt."""

    source: Int[Array, "N"]  # token index: visual tokens in raster order, then audio tokens
    positions: Int[Array, "N 3"]  # positions relative to the first media token
    last_chunk: int  # largest position in the last chunk; positions after the media continue from it


def chunks(times: Int[Array, "N"], length: int) -> list[tuple[int, int]]:
    """Split a list of tokens into chunks of `length` time units: (first, end) of each.

    As in the reference, each token that crosses a border advances by one chunk only. If a time step is longer than a
    chunk, a frame is split.
    """
    bounds, chunk = [0], 1
    for index, time in enumerate(times.tolist()):
        if time >= chunk * length:
            bounds.append(index)
            chunk += 1
    return list(zip(bounds, [*bounds[1:], len(times)]))


def interleave(grid: tuple[int, int, int], sounds: int, seconds_per_patch: float, config: ThinkerConfig) -> Interleaved:
    """Order video and audio tokens by time: for each chunk, the video tokens and then the audio tokens.

    Args:
        grid: temporal patches, rows and columns of merged cells.
        sounds: number of audio tokens; 0 for a clip without sound.
        seconds_per_patch: time between temporal patches.
    """
    patches, rows, columns = grid
    per_second = config.positions_per_second
    times = np.trunc(np.arange(patches, dtype=np.float32) * np.float32(seconds_per_patch) * per_second).astype(int)
    at = np.indices(grid).reshape(3, -1).T
    at[:, 0] = np.repeat(times, rows * columns)
    sound_at = np.repeat(np.arange(sounds)[:, None], 3, axis=1)
    if not sounds:
        return Interleaved(np.arange(len(at)), at, int(at.max()))
    length = int(per_second * config.seconds_per_chunk)
    pictures, sound = chunks(at[:, 0], length), chunks(sound_at[:, 0], length)
    source, positions = [], []
    for index in range(max(len(pictures), len(sound))):
        for parts, offset, values in ((pictures, 0, at), (sound, len(at), sound_at)):
            if index < len(parts):
                first, last = parts[index]
                source.append(np.arange(first, last) + offset)
                positions.append(values[first:last])
    return Interleaved(np.concatenate(source), np.concatenate(positions), int(positions[-1].max()))

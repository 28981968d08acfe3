"""How picture and sound interleave in time, and the TMRoPE ids of a prompt (Qwen2.5-Omni, 2.1)."""

from typing import NamedTuple

import numpy as np

from avocado_jax.models.config import ThinkerConfig
from avocado_jax.typing import Array, Int


class Interleaved(NamedTuple):
    """The media tokens of a clip in the order in which the language model reads them."""

    source: Int[Array, "N"]  # visual tokens in raster order are 0.., tokens of sound follow them
    positions: Int[Array, "N 3"]  # from 0: relative to where the media begin
    last_chunk: int  # largest id in the last chunk: what follows the media counts on from it


def chunks(times: Int[Array, "N"], length: int) -> list[tuple[int, int]]:
    """Cut a list of tokens at each `length` of time, as (first, past the last).

    As in the reference, the chunker moves on by one chunk per crossing token: where one step of time is
    longer than a chunk, it cuts a frame in pieces.
    """
    bounds, chunk = [0], 1
    for index, time in enumerate(times.tolist()):
        if time >= chunk * length:
            bounds.append(index)
            chunk += 1
    return list(zip(bounds, [*bounds[1:], len(times)]))


def interleave(grid: tuple[int, int, int], sounds: int, seconds_per_patch: float, config: ThinkerConfig) -> Interleaved:
    """Order picture and sound by time, chunk by chunk: the pictures of a chunk, then its sound.

    Args:
        grid: temporal patches, rows and columns of merged cells.
        sounds: tokens of sound; 0 for a clip without.
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

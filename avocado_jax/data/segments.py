"""Split long clips into segments at scene changes near a target length.

Consecutive thumbnails, `RATE` per second, are compared. A scene change is a difference that is large in absolute terms
and relative to its surroundings, which excludes motion and slow fades. Dynamic programming chooses the borders.
"""

from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from avocado_jax.data.container import Packets, one_line, open_clip, scan, video_stream
from avocado_jax.data.decode import PacketDecoder
from avocado_jax.typing import Array, Float

RATE = 4.0  # thumbnails per second
THUMBNAIL = 16  # width and height of a thumbnail in pixels
CHANGE = 0.1  # difference of two thumbnails, relative to full scale, of a certain scene change
RATIO = 4.0  # ratio to the surrounding differences of a certain scene change
AROUND = 2.0  # seconds before and after that are the surroundings
# Costs are relative to that of a segment of twice the target length.
UNSURE = 2.0  # cost of a border, multiplied by 1 - the confidence in a scene change
SURE = 0.8  # borders with less confidence are inside a scene
SPLIT = 100.0  # cost of a border inside a scene
SHORTEST = 1 / 6  # minimum length of a segment, relative to the target length


def find_segments(path: str | Path, target: float, longest: float) -> list[Packets]:
    """Find the segments of a clip. Clips of at most `longest` seconds, or without known frame times, have none.

    Args:
        target: target length of a segment in seconds.
        longest: maximum length of a segment in seconds.

    Raises:
        InputError: as `decode.read_media`, for errors that are detected without decoding.
    """
    path = Path(path)
    with one_line(path):
        packets = scan(path)
        if packets.times is None or packets.seconds <= longest:
            return []
        times = np.array([packets.time(time, packets.tick) for time in packets.times])
        first = np.searchsorted(times, np.arange(0.0, packets.seconds, 1 / RATE))
        chosen = np.unique(np.minimum(first, len(times) - 1))
        decoded, differences = _differences(path, [packets.times[number] for number in chosen])
        borders = choose_borders(
            np.array([packets.time(time, packets.tick) for time in decoded]),
            scene_changes(differences),
            packets.seconds,
            target,
            longest,
        )
        return [packets.part(start, end) for start, end in pairwise([0.0, *borders, packets.seconds + 1])]


def _differences(path: Path, chosen: list[int]) -> tuple[list[int], Float[Array, "N"]]:
    """The times of the decodable chosen frames, and the difference of each from the previous one."""
    wanted, decoded, differences, last = set(chosen), [], [], None
    with open_clip(path) as container:
        stream = video_stream(container)
        stream.thread_type = "SLICE"
        for frame in PacketDecoder(container, stream).frames(wanted):
            if frame.pts in wanted and not frame.is_corrupt:
                thumbnail = _thumbnail(frame)
                decoded.append(frame.pts)
                differences.append(0.0 if last is None else float(np.abs(thumbnail - last).mean()))
                last = thumbnail
    return decoded, np.array(differences)


def _thumbnail(frame: av.VideoFrame) -> Float[Array, "h w 3"]:
    small = frame.reformat(THUMBNAIL, THUMBNAIL, "rgb24", interpolation="AREA")
    return small.to_ndarray().astype(np.float32) / 255


def scene_changes(differences: Float[Array, "N"]) -> Float[Array, "N"]:
    """The confidence, in [0, 1], that a scene starts at each thumbnail."""
    reach = round(AROUND * RATE)
    padded = np.pad(differences, reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    counted = np.lib.stride_tricks.sliding_window_view(np.pad(np.ones(len(differences)), reach), 2 * reach + 1)
    others = (windows.sum(axis=1) - differences) / np.maximum(counted.sum(axis=1) - 1, 1)
    near = np.maximum(padded[reach - 1 : -reach - 1], padded[reach + 1 : len(padded) - reach + 1])
    ratio = differences / (np.maximum(others, near / 2) + 0.005)  # motion has neighbours of similar size
    return np.clip(differences / CHANGE, 0, 1) * np.clip((ratio - 1) / (RATIO - 1), 0, 1)


def choose_borders(
    times: Float[Array, "N"], changes: Float[Array, "N"], seconds: float, target: float, longest: float
) -> list[float]:
    """Choose the cheapest segment borders among `times`.

    A segment costs ((length - target) / target)^2, a border `UNSURE` x (1 - change), plus `SPLIT` inside a scene, so
    that only scenes longer than `longest` are split. Segments are not shorter than `SHORTEST` if possible.
    """
    inner = (times > 0) & (times < seconds)
    places = np.concatenate([[0.0], times[inner], [seconds]])
    border = np.concatenate([[0.0], UNSURE * (1 - changes[inner]) + SPLIT * (changes[inner] < SURE), [0.0]])
    cost, before = np.full(len(places), np.inf), np.zeros(len(places), int)
    cost[0] = 0.0
    for end in range(1, len(places)):
        first = int(np.searchsorted(places, places[end] - longest))
        first = min(first, end - 1)  # no thumbnail within `longest`
        lengths = places[end] - places[first:end]
        costs = cost[first:end] + ((lengths - target) / target) ** 2 + np.where(lengths < SHORTEST * target, 100.0, 0.0)
        best = int(np.argmin(costs))
        cost[end], before[end] = costs[best] + border[end], first + best
    found, end = [], int(before[-1])
    while end > 0:
        found.append(float(places[end]))
        end = int(before[end])
    return found[::-1]

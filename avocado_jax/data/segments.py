"""Segment borders of a long clip: scene changes near a target length.

Thumbnails of `RATE` frames a second are compared. A scene change is a difference between two of them that is large, and
large beside those around it, so that motion and slow fades are none. Dynamic programming chooses the borders.
"""

from itertools import pairwise
from pathlib import Path

import av
import numpy as np

from avocado_jax.data.container import Packets, one_line, open_clip, scan, video_stream
from avocado_jax.data.decode import PacketDecoder
from avocado_jax.typing import Array, Float

RATE = 4.0  # thumbnails a second
THUMBNAIL = 16  # width and height of a thumbnail, in pixels
CHANGE = 0.1  # difference of two thumbnails, of full scale, that may be a scene change
RATIO = 4.0  # of it to those around it
AROUND = 2.0  # seconds
# A segment of twice the target length costs 1.
UNSURE = 2.0  # what a border costs where a scene change is unsure, by how unsure it is
SURE = 0.8  # a border at a place of less is inside of a scene
SPLIT = 100.0  # and costs so much
SHORTEST = 1 / 6  # of a segment, in target lengths


def find_segments(path: str | Path, target: float, longest: float) -> list[Packets]:
    """The segments of a clip, in seconds; none for a clip of at most `longest` seconds, which is not cut.

    A clip whose frames have no known times is not cut either.

    Raises:
        InputError: as `decode.read_media`, for what shows without decoding.
    """
    path = Path(path)
    with one_line(path):
        packets = scan(path)
        if packets.times is None or packets.seconds <= longest:
            return []
        times = np.array([packets.time(one, packets.tick) for one in packets.times])
        first = np.searchsorted(times, np.arange(0.0, packets.seconds, 1 / RATE))
        chosen = np.unique(np.minimum(first, len(times) - 1))
        decoded, differences = _differences(path, [packets.times[number] for number in chosen])
        borders = choose_borders(
            np.array([packets.time(one, packets.tick) for one in decoded]),
            scene_changes(differences),
            packets.seconds,
            target,
            longest,
        )
        return [packets.part(start, end) for start, end in pairwise([0.0, *borders, packets.seconds + 1])]


def _differences(path: Path, chosen: list[int]) -> tuple[list[int], Float[Array, "N"]]:
    """The times of the chosen frames that can be decoded, and what each differs by from the one before it."""
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
    """How surely a scene starts with each thumbnail: 0 to 1."""
    reach = round(AROUND * RATE)
    padded = np.pad(differences, reach)
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    counted = np.lib.stride_tricks.sliding_window_view(np.pad(np.ones(len(differences)), reach), 2 * reach + 1)
    others = (windows.sum(axis=1) - differences) / np.maximum(counted.sum(axis=1) - 1, 1)
    near = np.maximum(padded[reach - 1 : -reach - 1], padded[reach + 1 : len(padded) - reach + 1])
    ratio = differences / (np.maximum(others, near / 2) + 0.005)  # a burst of motion has neighbours of its size
    return np.clip(differences / CHANGE, 0, 1) * np.clip((ratio - 1) / (RATIO - 1), 0, 1)


def choose_borders(
    times: Float[Array, "N"], changes: Float[Array, "N"], seconds: float, target: float, longest: float
) -> list[float]:
    """The borders of segments: the cheapest choice among `times`.

    A segment costs ((length - target) / target)^2, a border `UNSURE` x (1 - change), and `SPLIT` inside of a scene:
    scenes are cut only where they are longer than `longest`. Segments are not shorter than `SHORTEST` if possible.
    """
    inner = (times > 0) & (times < seconds)
    places = np.concatenate([[0.0], times[inner], [seconds]])
    border = np.concatenate([[0.0], UNSURE * (1 - changes[inner]) + SPLIT * (changes[inner] < SURE), [0.0]])
    cost, before = np.full(len(places), np.inf), np.zeros(len(places), int)
    cost[0] = 0.0
    for end in range(1, len(places)):
        first = int(np.searchsorted(places, places[end] - longest))
        first = min(first, end - 1)  # no thumbnail for so long
        lengths = places[end] - places[first:end]
        costs = cost[first:end] + ((lengths - target) / target) ** 2 + np.where(lengths < SHORTEST * target, 100.0, 0.0)
        best = int(np.argmin(costs))
        cost[end], before[end] = costs[best] + border[end], first + best
    found, end = [], int(before[-1])
    while end > 0:
        found.append(float(places[end]))
        end = int(before[end])
    return found[::-1]

"""Read a clip from separate files: frames as images, and sound."""

from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from avocado_jax.data.container import MOST_PIXELS, Packets, one_line
from avocado_jax.data.decode import FrameFit, read_sound
from avocado_jax.data.media import Media, Reading
from avocado_jax.errors import InputError

KINDS = {b"\xff\xd8\xff": "mjpeg", b"\x89PNG\r\n\x1a\n": "png"}  # first bytes of a file -> decoder
GREY = 128


def read_parts(pictures: Sequence[str], sound: str | None, reading: Reading = Reading()) -> Media:
    """Read a clip from images, one every 1 / `fps` seconds, and a sound file. Without images the frames are grey.

    Args:
        pictures: JPEG or PNG files; all are resized to the size of the first one.
        sound: a sound file.

    Raises:
        InputError: one line with the path of the file that cannot be read.
    """
    samples, warnings = None, []
    if sound is not None:
        with one_line(Path(sound)):
            packets = Packets(0, 0, None, 0.0, 0.0, 0.0)  # unknown, with times from 0
            samples, warnings = read_sound(Path(sound), packets, 0.0, reading)
            if samples is None:
                raise InputError("has no sound")
    fit = FrameFit(max(len(pictures), 2), reading)
    frames = []
    for path in pictures:
        with one_line(Path(path)):
            frames.append(fit(_decoded(Path(path).read_bytes())))
    if not frames:
        size = reading.size_factor * max(1, round((reading.fewest_pixels**0.5) / reading.size_factor))
        frames = [np.full((size, size, 3), GREY, np.uint8)]
    frames += frames[-1:] * (len(frames) % 2)  # two frames make one temporal patch
    seconds = max(len(frames) / reading.fps, 0.0 if samples is None else len(samples) / reading.sound_rate)
    return Media(np.stack(frames), samples, seconds, np.arange(len(frames)) / reading.fps, tuple(warnings))


def _decoded(file: bytes) -> av.VideoFrame:
    kind = next((decoder for start, decoder in KINDS.items() if file.startswith(start)), None)
    if kind is None:
        raise InputError("not a JPEG or PNG file")
    codec = av.CodecContext.create(kind, "r")
    codec.options = {"max_pixels": str(MOST_PIXELS)}  # a small file may declare any size
    frames = [*codec.decode(av.Packet(file)), *codec.decode(None)]
    if not frames:
        raise InputError("has no picture")
    return frames[0]

"""A clip's file to arrays, with PyAV."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
import librosa
import numpy as np

from avocado_jax.data.features import choose_frames, frame_pixels, frame_size, resize
from avocado_jax.data.media import Media, Reading
from avocado_jax.errors import InputError
from avocado_jax.typing import Array, Float, Shaped


class _Packets(NamedTuple):
    """What demuxing tells, before anything is decoded."""

    frames: int
    seconds: float
    times: list[int] | None  # each frame's presentation time, in order; None where packets do not tell


class Probe(NamedTuple):
    """What a clip's file says of itself, with nothing decoded."""

    seconds: float
    frames: int  # that would be chosen
    sound: bool  # whether there is an audio stream


def probe_media(path: str | Path, reading: Reading = Reading()) -> Probe:
    """Look at a clip's packets. Raises as `read_media`, for what shows without decoding."""
    path = Path(path)
    with _one_line(path):
        packets = _demux(path)
        with _open(path) as container:
            rate, sound = _rate(_video(container)), container.streams.best("audio") is not None
        chosen = choose_frames(packets.frames, rate, reading.fps, reading.fewest_frames, reading.most_frames)
    return Probe(packets.seconds, len(chosen), sound)


def read_media(path: str | Path, reading: Reading = Reading(), sound: bool = True) -> Media:
    """Read a clip: chosen frames, upright and resized, and its sound if there is any and it is wanted.

    Raises:
        InputError: one line with the path and the reason: missing, empty, not a video, no picture, cut
            short, damaged.
    """
    path = Path(path)
    with _one_line(path):
        packets = _demux(path)
        frames = _picture(path, packets, reading)
        samples = _sound(path, reading) if sound else None
    return Media(frames, samples, packets.seconds)


@contextmanager
def _one_line(path: Path) -> Iterator[None]:
    """Every way in which a file can be bad, as one line that names it."""
    try:
        if not path.exists():
            raise InputError("no such file")
        if not path.is_file():  # a pipe would be waited for
            raise InputError("is a folder" if path.is_dir() else "is not a file")
        if path.stat().st_size == 0:
            raise InputError("is empty (zero bytes)")
        if not os.access(path, os.R_OK):
            raise InputError("may not be read")
        yield
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except (av.error.FFmpegError, ValueError, OSError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise InputError(f"{path}: damaged, cannot be decoded ({reason})") from error


def _open(path: Path) -> av.container.InputContainer:
    """Open a file: by the scheme that takes any name (`12:30.mp4` is no protocol), whatever its titles' encoding."""
    try:
        return av.open(f"file:{path}", metadata_errors="replace")
    except av.error.InvalidDataError as error:
        raise InputError("not a video, or its header is damaged or cut off") from error


def _video(container: av.container.InputContainer) -> av.VideoStream:
    """The picture's stream, by the rule of FFmpeg's tools; a cover is none."""
    stream = container.streams.best("video")
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise InputError("has no picture" + (" (sound only)" if container.streams.audio else ""))
    return stream


def _demux(path: Path) -> _Packets:
    """Count the picture's packets, and notice a file that ends before it says it does."""
    with _open(path) as container:
        stream = _video(container)
        stated = float(container.duration / av.time_base) if container.duration else None
        frames, end, times = 0, 0.0, []
        for packet in container.demux():
            if packet.size and packet.pts is not None:
                begun = float(packet.pts * packet.time_base)
                end = max(end, begun + float((packet.duration or 0) * packet.time_base))
            if packet.size and packet.stream.index == stream.index and not packet.is_discard:
                frames += 1
                times.append(packet.pts)
        start = max(0.0, float((container.start_time or 0) / av.time_base))
        if not frames:
            raise InputError("its picture has no frames")
        # A tenth and a frame of slack: containers round, and the last packet may state no duration.
        slack = 0.1 * (stated or 0.0) + 0.1 + 1 / _rate(stream)
        if stream.frames > frames + 1 or (stated and end - start < stated - slack):
            raise InputError(
                f"cut short or damaged: {frames} of {stream.frames or 'its'} frames, {end:.1f} s of {stated or 0:.1f} s"
            )
        told = None not in times and len(set(times)) == frames
        return _Packets(frames, stated or end - start or frames / _rate(stream), sorted(times) if told else None)


def _picture(path: Path, packets: _Packets, reading: Reading) -> Shaped[Array, "N h w 3"]:
    """Decode once, converting and resizing only the chosen frames."""
    with _open(path) as container:
        rate = _rate(_video(container))
    chosen = choose_frames(packets.frames, rate, reading.fps, reading.fewest_frames, reading.most_frames).tolist()
    fit = _Fit(len(chosen), reading)
    if packets.times:
        found = _decode_by_time(path, [packets.times[index] for index in chosen], fit)
        if all(time in found for time in (packets.times[index] for index in chosen)):
            return np.stack([found[packets.times[index]] for index in chosen])
    return np.stack(_decode_in_order(path, packets.frames, chosen, fit))


def _decode_by_time(path: Path, times: list[int], fit: "_Fit") -> dict[int, np.ndarray]:
    """The frames shown at these times, as far as there are such.

    Frames that are neither wanted nor referred to by others are not decoded: the rest is the same to the bit,
    for two thirds of the work in an ordinary h264 file.
    """
    wanted, found = set(times), {}
    with _open(path) as container:
        stream = _video(container)
        stream.thread_type = "SLICE"
        for packet in container.demux(stream):
            needed = packet.pts is None or packet.pts in wanted
            stream.codec_context.skip_frame = "DEFAULT" if needed else "NONREF"
            for frame in packet.decode():
                if frame.pts in wanted:
                    found[frame.pts] = fit(frame)
            if len(found) == len(wanted):
                break
    return found


def _decode_in_order(path: Path, total: int, chosen: list[int], fit: "_Fit") -> list[np.ndarray]:
    """The chosen frames by counting all of them: for files whose packets do not tell their times."""
    out, wanted, frame = [], iter(chosen), None
    with _open(path) as container:
        index = next(wanted)
        for number, frame in enumerate(container.decode(_video(container))):
            while index == number:
                out.append(fit(frame))
                index = next(wanted, None)
            if index is None:
                break
        if frame is None:
            raise InputError("its picture has no frames")
        if len(out) < len(chosen):
            # Streams may end in a packet or two that yield no picture; more is damage.
            if number + 1 < 0.9 * total and number + 2 < total:
                raise InputError(f"damaged: {number + 1} of {total} frames can be decoded")
            out += [fit(frame)] * (len(chosen) - len(out))
    return out


def _rate(stream: av.VideoStream) -> float:
    """Frames a second."""
    return float(stream.average_rate or stream.base_rate or 25)


class _Fit:
    """Frames to upright RGB pictures of the clip's size, which its first frame decides."""

    def __init__(self, frames: int, reading: Reading) -> None:
        self.frames, self.reading = frames, reading
        self.sizes: list[tuple[int, int]] | None = None

    def __call__(self, frame: av.VideoFrame) -> Shaped[Array, "rows columns 3"]:
        picture = np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), k=round(frame.rotation / 90)))
        self.sizes = self.sizes or _sizes(*picture.shape[:2], self.frames, self.reading)
        for size in self.sizes:
            picture = resize(picture, *size)
        return picture


def _sizes(height: int, width: int, frames: int, reading: Reading) -> list[tuple[int, int]]:
    """What each of `frames` frames is resized to, one size after the other.

    The first is the share of the clip's budget. Rounded down to whole cells, it may hold fewer pixels than
    the least, and then the reference's processor enlarges the frame once more: so it is for long clips.
    """
    least, factor = reading.fewest_pixels, reading.size_factor
    most = frame_pixels(frames, least, reading.most_pixels, reading.clip_pixels, reading.asked_pixels)
    shared = frame_size(height, width, least, most, factor)
    return [shared, frame_size(*shared, least, reading.most_pixels, factor)]


def _sound(path: Path, reading: Reading) -> Float[Array, "n"] | None:
    """The best audio stream as mono at `sound_rate`; None where there is none, or nothing in it."""
    with _open(path) as container:
        stream = container.streams.best("audio")
        if stream is None:
            return None
        if stream.codec_context is None:
            raise InputError("its sound is in a format that cannot be decoded")
        parts, length = [], 0
        for frame in container.decode(stream):
            block, rate = frame.to_ndarray(), frame.sample_rate
            if not frame.format.is_planar:
                block = block.reshape(-1, frame.layout.nb_channels).T
            if block.dtype.kind != "f":  # integers to -1..1; unsigned bytes are centred on 128
                bounds = np.iinfo(block.dtype)
                middle, half = (bounds.max + bounds.min + 1) / 2, (bounds.max - bounds.min + 1) / 2
                block = (block.astype(np.float32) - middle) / half
            parts.append(block.astype(np.float32).mean(axis=0))
            length += frame.samples
            if length > (reading.sound_seconds + 1) * rate:
                break
    if not length:
        return None
    mono = np.concatenate(parts)
    if not np.isfinite(mono).all():
        raise InputError("damaged: its sound holds values that are no numbers")
    if rate != reading.sound_rate:
        mono = librosa.resample(mono, orig_sr=rate, target_sr=reading.sound_rate, res_type="soxr_hq")
    return mono[: reading.sound_seconds * reading.sound_rate]

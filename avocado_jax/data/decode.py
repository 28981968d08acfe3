"""Decode the file of a clip to arrays with PyAV."""

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

import av
import librosa
import numpy as np

from avocado_jax.data.container import (
    LOST,
    Clock,
    Packets,
    check_size,
    one_line,
    open_clip,
    scan,
    video_stream,
)
from avocado_jax.data.features import choose_frames, frame_pixels, frame_size, resize
from avocado_jax.data.media import Media, Reading
from avocado_jax.errors import InputError
from avocado_jax.typing import Array, Float, Shaped

OFFSET = 0.1  # seconds; audio further from its expected time is displaced
EARLY = 1.0  # seconds that audio times may lag behind the samples: some containers interpolate them
BEFORE = 1.0  # seconds of audio decoded and discarded before a part of a clip
TAIL = 2  # packets at the end of a stream that may yield no frame


class Probe(NamedTuple):
    """Properties of a clip from its packets, without decoding."""

    seconds: float
    frames: int  # number of frames that would be chosen
    sound: bool  # whether there is an audio stream


def probe_media(path: str | Path, reading: Reading = Reading()) -> Probe:
    """Inspect the packets of a clip. Raises as `read_media`, for errors that are detected without decoding."""
    path = Path(path)
    with one_line(path):
        packets = scan(path)
        with open_clip(path) as container:
            sound = bool(container.streams.audio)
        return Probe(packets.seconds, len(_frame_indices(packets.frames, packets.rate, reading)), sound)


def read_media(
    path: str | Path, reading: Reading = Reading(), sound: bool = True, part: Packets | None = None
) -> Media:
    """Read a clip: the chosen frames, upright and resized, and optionally its sound.

    Clips with minor damage are read, and `warnings` describes the damage.

    Args:
        sound: whether to read the sound.
        part: a result of `Packets.part`; None: the whole clip. The sound of a part is aligned to its time.

    Raises:
        InputError: one line with the path and the reason: missing, empty, not a video, no picture, cut
            short, damaged.
    """
    path = Path(path)
    with one_line(path):
        packets = part or scan(path)
        if part is not None:
            reading = replace(reading, align_sound=True)
        frames, times, warnings = _picture(path, packets, reading)
        samples = None
        if sound:
            samples, sound_warnings = read_sound(path, packets, 0.0 if part else times[0], reading)
            warnings += sound_warnings
        return Media(frames, samples, packets.seconds, np.array(times), tuple(warnings))


class PacketDecoder:
    """Decodes one stream of a clip and skips packets that cannot be decoded.

    Attributes:
        packets, failed: number of packets passed to the decoder, and number of them that raised an error.
    """

    def __init__(self, container: av.container.InputContainer, stream: av.stream.Stream) -> None:
        self._container, self._stream = container, stream
        self.packets = self.failed = 0

    def frames(
        self, wanted: set[int] | None = None, first_key: int | None = None, seek: bool = False
    ) -> Iterator[av.VideoFrame | av.AudioFrame]:
        """Yield all frames in presentation order.

        Args:
            wanted: presentation times; only these frames and their references are decoded.
            first_key: decode from the first key frame at or after this time.
            seek: seek to that key frame instead of reading the file up to it.
        """
        context = self._stream.codec_context
        packets = self._packets_from(first_key) if seek and first_key is not None else self._packets()
        for packet in packets:
            if first_key is not None:
                if not packet.is_keyframe or packet.pts is None or packet.pts < first_key:
                    continue
                first_key = None
            if wanted is not None:
                needed = packet.pts is None or packet.pts in wanted
                context.skip_frame = "DEFAULT" if needed else "NONREF"
            self.packets += 1
            yield from self._attempt(packet)
        yield from self._attempt(None)

    def _packets(self) -> Iterator[av.Packet]:
        return Clock(self._container).packets(self._container, self._stream)

    def _packets_from(self, time: int) -> Iterator[av.Packet]:
        """The packets from a key frame at or before `time`, or from the beginning if the file has no index."""
        if time <= (self._stream.start_time or 0):
            return self._packets()
        with suppress(av.error.FFmpegError):
            self._container.seek(time, stream=self._stream)
            packets = self._packets()
            first = next(packets, None)
            if first is not None and first.pts is not None and first.pts <= time:
                return chain([first], packets)
        self._container.seek(self._container.start_time or 0)
        return self._packets()

    def _attempt(self, packet: av.Packet | None) -> list[av.VideoFrame | av.AudioFrame]:
        try:
            return self._stream.codec_context.decode(packet)
        except av.error.EOFError:
            return []
        except av.error.FFmpegError as error:
            if isinstance(error, MemoryError):
                raise
            self.failed += 1
            return []


def _frame_indices(total: int, rate: float, reading: Reading) -> list[int]:
    return choose_frames(total, rate, reading.fps, reading.fewest_frames, reading.most_frames).tolist()


def _picture(path: Path, packets: Packets, reading: Reading) -> tuple[Shaped[Array, "N h w 3"], list[float], list[str]]:
    """Read the chosen frames, their times in seconds, and warnings. Converts and resizes only the chosen frames."""
    chosen = _frame_indices(packets.frames, packets.rate, reading)
    lost, total = packets.missing, packets.frames + packets.missing
    found = _decode_by_time(path, packets, chosen, reading) if packets.times else None
    if found is None:
        good, unreadable, times = _decodable(path, packets)
        lost += unreadable
        if not good or lost > LOST * total:
            raise InputError(f"damaged: {len(good)} of {total} frames can be decoded")
        chosen = [good[index] for index in _frame_indices(len(good), packets.rate, reading)]
        found = _decode_in_order(path, chosen, reading), [times[number] for number in chosen]
    warnings = [f"{lost} of {total} frames ({lost / total:.1%}) are damaged or missing"] * bool(lost)
    return np.stack(found[0]), found[1], warnings


def _decode_by_time(
    path: Path, packets: Packets, chosen: list[int], reading: Reading
) -> tuple[list[np.ndarray], list[float]] | None:
    """Decode the frames at the chosen times; None if a frame is missing or a packet cannot be decoded.

    Frames that are neither chosen nor referenced are not decoded. The others are bit-identical, at two thirds of the
    work for an ordinary h264 file.
    """
    times = [packets.times[index] for index in chosen]
    wanted, found, fit = set(times), {}, FrameFit(len(chosen), reading)
    with open_clip(path) as container:
        stream = video_stream(container)
        stream.thread_type = "SLICE"
        decoder, tick = PacketDecoder(container, stream), float(stream.time_base)
        for frame in decoder.frames(wanted, packets.first_key, packets.seekable):
            if frame.pts in wanted and not frame.is_corrupt:
                found[frame.pts] = fit(frame)
            if len(found) == len(wanted) or decoder.failed:
                break
    if decoder.failed or len(found) < len(wanted):
        return None
    return [found[time] for time in times], [packets.time(time, tick) for time in times]


def _decodable(path: Path, packets: Packets) -> tuple[list[int], int, list[float]]:
    """Decode the whole stream. Returns the indices of good frames, the number of lost frames, and all times."""
    good, times, corrupt, outside, fields = [], [], 0, 0, False
    with open_clip(path) as container:
        stream = video_stream(container)
        decoder, tick = PacketDecoder(container, stream), float(stream.time_base)
        for number, frame in enumerate(decoder.frames()):
            time = number / packets.rate if frame.pts is None else packets.time(frame.pts, tick)
            times.append(time)
            if packets.first_key is not None and not 0 <= time < packets.seconds:
                outside += 1
                continue
            fields = fields or frame.interlaced_frame
            if frame.is_corrupt:
                corrupt += 1
            else:
                good.append(number)
    found = len(times) - outside
    absent = packets.frames - found
    if absent <= TAIL or (fields and found >= packets.frames // 2 - TAIL):  # two fields make one frame
        absent = 0
    return good, max(absent, decoder.failed) + corrupt, times


def _decode_in_order(path: Path, chosen: list[int], reading: Reading) -> list[np.ndarray]:
    """Decode the frames with these indices, in decoding order."""
    out, fit, wanted = {}, FrameFit(len(chosen), reading), set(chosen)
    with open_clip(path) as container:
        for number, frame in enumerate(PacketDecoder(container, video_stream(container)).frames()):
            if number in wanted:
                out[number] = fit(frame)
                if len(out) == len(wanted):
                    break
    return [out[number] for number in chosen]


class FrameFit:
    """Converts frames to upright RGB images of one size, determined by the first frame."""

    def __init__(self, frames: int, reading: Reading) -> None:
        self.frames, self.reading = frames, reading
        self.sizes: list[tuple[int, int]] | None = None

    def __call__(self, frame: av.VideoFrame) -> Shaped[Array, "rows columns 3"]:
        check_size(frame.width, frame.height)
        picture = np.ascontiguousarray(_upright(frame))
        self.sizes = self.sizes or _sizes(*picture.shape[:2], self.frames, self.reading)
        for size in self.sizes:
            picture = resize(picture, *size)
        return picture


def _upright(frame: av.VideoFrame) -> Shaped[Array, "rows columns 3"]:
    """Apply the display matrix of a frame: rotate and, if needed, mirror it."""
    picture, turned = frame.to_ndarray(format="rgb24"), frame.rotation
    if (matrix := frame.side_data.get("DISPLAYMATRIX")) is not None:
        a, b, _, c, d, *_ = (int(part) for part in np.frombuffer(bytes(matrix), "<i4"))
        if a * d - b * c < 0:  # mirrored: flip, then rotate by the remaining angle
            picture, turned = picture[:, ::-1], -np.degrees(np.arctan2(-b, -a))
    return np.rot90(picture, k=round(turned / 90))


def _sizes(height: int, width: int, frames: int, reading: Reading) -> list[tuple[int, int]]:
    """The sizes that each of `frames` frames is resized to, in sequence.

    The first size follows from the clip's pixel budget. Rounded down to whole cells, it may have fewer pixels than the
    minimum (in long clips). The reference processor then enlarges the frame to the second size.
    """
    least, factor = reading.fewest_pixels, reading.size_factor
    most = frame_pixels(frames, least, reading.most_pixels, reading.clip_pixels, reading.asked_pixels)
    shared = frame_size(height, width, least, most, factor)
    return [shared, frame_size(*shared, least, reading.most_pixels, factor)]


class _Stretch:
    """Contiguous audio of one sample rate."""

    def __init__(self, start: float, rate: int) -> None:
        self.start, self.rate, self.length = start, rate, 0
        self.blocks: list[np.ndarray] = []

    @property
    def end(self) -> float:
        return self.start + self.length / self.rate


def read_sound(
    path: Path, packets: Packets, picture: float, reading: Reading
) -> tuple[Float[Array, "n"] | None, list[str]]:
    """Read the best audio stream as mono at `sound_rate`, with warnings; None without a stream or samples.

    Args:
        picture: start of the video in seconds.
    """
    with open_clip(path) as container:
        # `best` skips streams without a decoder, and streams whose format follows later in the file.
        stream = container.streams.best("audio") or next(iter(container.streams.audio), None)
        if stream is None:
            return None, []
        if stream.codec_context is None:
            raise InputError("its sound is in a format that cannot be decoded")
        stretches, length, decoder, more = [], 0.0, PacketDecoder(container, stream), False
        inside, tick = packets.first_key is not None, float(stream.time_base)
        first_key = round((packets.origin - BEFORE) / tick) if inside else None
        for frame in decoder.frames(first_key=first_key, seek=packets.seekable):
            expected = stretches[-1].end if stretches else 0.0
            start = expected if frame.pts is None else packets.time(frame.pts, tick)
            if inside and start + frame.samples / frame.sample_rate <= 0:
                continue
            if inside and start >= packets.seconds:
                break
            if not stretches or frame.sample_rate != stretches[-1].rate or not -EARLY <= start - expected <= OFFSET:
                stretches.append(_Stretch(start, frame.sample_rate))
            stretches[-1].blocks.append(_mono(frame))
            stretches[-1].length += frame.samples
            length += frame.samples / frame.sample_rate
            if (stretches[-1].end if reading.align_sound else length) > reading.sound_seconds + 1:
                more = True
                break
    if decoder.failed > LOST * decoder.packets:
        raise InputError(
            f"damaged: {decoder.packets - decoder.failed} of {decoder.packets} packets of its sound remain"
        )
    warnings = [f"{decoder.failed} packets of its sound are damaged"] * bool(decoder.failed)
    if not length:
        return None, warnings
    if more:
        warnings.append(f"only the first {reading.sound_seconds} s of its sound are used")
    warnings += _sync_warnings(stretches, picture)
    parts = _resampled(stretches, reading)
    if reading.align_sound:
        mono = np.zeros(max(0, *(offset + len(part) for offset, part in parts)), np.float32)
        for offset, part in parts:
            mono[max(0, offset) : max(0, offset + len(part))] = part[max(0, -offset) :]
    else:
        mono = np.concatenate([part for _, part in parts])
    seconds = min(packets.seconds, reading.sound_seconds) if inside else reading.sound_seconds
    return mono[: round(seconds * reading.sound_rate)], warnings


def _mono(frame: av.AudioFrame) -> Float[Array, "n"]:
    """The mean of a frame's channels, as float32."""
    block = frame.to_ndarray()
    if not frame.format.is_planar:
        block = block.reshape(-1, frame.layout.nb_channels).T
    if block.dtype.kind != "f":  # scale integers to [-1, 1]; unsigned bytes are centred on 128
        bounds = np.iinfo(block.dtype)
        middle, half = (bounds.max + bounds.min + 1) / 2, (bounds.max - bounds.min + 1) / 2
        block = (block.astype(np.float32) - middle) / half
    return block.astype(np.float32).mean(axis=0)


def _sync_warnings(stretches: list[_Stretch], picture: float) -> list[str]:
    """Warnings about sound that does not start with the picture, or has gaps."""
    warnings, offset = [], stretches[0].start - picture
    if abs(offset) > OFFSET:
        direction = "after" if offset > 0 else "before"
        warnings.append(f"its sound starts {abs(offset):.2f} s {direction} its picture")
    gaps = [(before.end, after.start - before.end) for before, after in pairwise(stretches)]
    gaps = [(time, gap) for time, gap in gaps if abs(gap) > OFFSET]
    if gaps:
        total = sum(gap for _, gap in gaps)
        warnings.append(f"its sound has {len(gaps)} gap(s), {total:.2f} s in total, the first at {gaps[0][0]:.2f} s")
    return warnings


def _resampled(stretches: list[_Stretch], reading: Reading) -> list[tuple[int, Float[Array, "n"]]]:
    """Resample to `sound_rate`: (first sample, samples) of each part. Without `align_sound`, close gaps first."""
    groups: list[list[_Stretch]] = []
    for stretch in stretches:
        if groups and not reading.align_sound and groups[-1][0].rate == stretch.rate:
            groups[-1].append(stretch)
        else:
            groups.append([stretch])
    parts = []
    for group in groups:
        mono = np.concatenate([block for stretch in group for block in stretch.blocks])
        if not np.isfinite(mono).all():
            raise InputError("damaged: its sound contains NaN or infinite values")
        if group[0].rate != reading.sound_rate:
            mono = librosa.resample(mono, orig_sr=group[0].rate, target_sr=reading.sound_rate, res_type="soxr_hq")
        parts.append((round(group[0].start * reading.sound_rate), mono))
    return parts

"""Clips that were cut, joined, recorded and named in common ways, written with PyAV, and their expected content.

The picture's brightness states its time: `dark + time * slope`. Sound is a tone with a burst at a known time. The
expectations follow from how each file is written, not from what a reader found.
"""

import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np

RATE, SOUND = 25, 48_000
SECONDS = 4.0
DARK, SLOPE = 20.0, 50.0  # of brightness, and its rise in a second


class Kind(NamedTuple):
    """One kind of clip.

    Attributes:
        refused: part of the reason; None where the clip is read.
        seconds: of picture and sound.
        first: time of the first frame on the timeline of the clip, in seconds.
        begins: time of the first frame in the picture's brightness.
        falls: whether the picture falls dark again after half of the time, as in joined recordings.
        burst: where the burst of sound is in the samples, as the reference reads it; `aligned`: at its time.
        warning: part of the warning; None where there is none.
    """

    write: Callable[[Path], object]
    refused: str | None = None
    seconds: float = SECONDS
    first: float = 0.0
    begins: float = 0.0
    falls: bool = False
    burst: float | None = None
    aligned: float | None = None
    warning: str | None = None


def brightness(time: float) -> float:
    """Brightness of the picture, 0 to 255, at a time of the recording."""
    return DARK + SLOPE * time


def write(
    path: Path,
    seconds: float = SECONDS,
    codec: str = "libx264",
    sound: float | None = None,
    late: float = 0.0,
    sound_late: float = 0.0,
    gap: tuple[float, float] = (0.0, 0.0),
    sound_codec: str = "aac",
    sound_rate: int = SOUND,
    times: Sequence[int] | None = None,
    start: float = 0.0,
    bframes: int = 2,
    group: int = 25,
    format: str | None = None,
    options: dict[str, str] | None = None,
    size: tuple[int, int] = (96, 64),
) -> Path:
    """Write a clip of 25 frames a second.

    Args:
        sound: its length in seconds, with a burst in its middle fifth of a second; None for none.
        late, sound_late: seconds at which picture and sound start.
        gap: sound between these seconds is left out.
        times: frames that exist, by number; by default all.
        start: seconds that are added to every time.
    """
    with av.open(str(path), "w", format=format, options=options or {}) as out:
        video = out.add_stream(codec, rate=RATE)
        video.width, video.height, video.pix_fmt = *size, "yuv420p"
        video.codec_context.thread_count = 1
        video.codec_context.gop_size = group
        if codec == "libx264":
            video.options = {"crf": "12", "preset": "veryfast", "bf": str(bframes), "sc_threshold": "0"}
        elif codec in ("mpeg4", "mpeg2video", "wmv2", "flv"):
            video.codec_context.max_b_frames = 0
            video.codec_context.bit_rate = 400_000
        audio = out.add_stream(sound_codec, rate=sound_rate, layout="mono") if sound else None
        for number in times if times is not None else range(round(seconds * RATE)):
            shade = min(255, round(brightness(number / RATE)))
            frame = av.VideoFrame.from_ndarray(np.full((size[1], size[0], 3), shade, np.uint8), format="rgb24")
            frame.pts = number
            _mux(out, video.encode(frame), start + late)
        _mux(out, video.encode(None), start + late)
        if audio is not None:
            wave = tone(sound, sound_rate)
            for first in range(0, len(wave), 1024):
                if gap[0] <= first / sound_rate < gap[1]:
                    continue
                block = av.AudioFrame.from_ndarray(wave[None, first : first + 1024].copy(), "fltp", "mono")
                block.sample_rate, block.pts = sound_rate, first
                _mux(out, audio.encode(block), start + sound_late)
            _mux(out, audio.encode(None), start + sound_late)
    return path


def tone(seconds: float, rate: int = SOUND) -> np.ndarray:
    """A quiet tone with a loud burst of a fifth of a second that begins in the middle."""
    time = np.arange(round(seconds * rate)) / rate
    loud = (time >= seconds / 2) & (time < seconds / 2 + 0.2)
    return ((0.02 + 0.5 * loud) * np.sin(2 * np.pi * 1000 * time)).astype(np.float32)


def _mux(out: av.container.OutputContainer, packets: list[av.Packet], shift: float) -> None:
    for packet in packets:
        if shift:
            ticks = round(shift / packet.time_base)
            packet.pts, packet.dts = packet.pts + ticks, packet.dts + ticks
        out.mux(packet)


def remux(
    source: Path, path: Path, change: Callable[[int, av.Packet], av.Packet | None], options: dict | None = None
) -> Path:
    """Copy packets; `change` gets each packet's number in its stream and returns it, another one or None."""
    with av.open(str(source)) as given, av.open(str(path), "w", options=options or {}) as out:
        streams = {stream.index: out.add_stream_from_template(stream) for stream in given.streams}
        numbers = dict.fromkeys(streams, 0)
        for packet in given.demux():
            if packet.size:
                number, index = numbers[packet.stream_index], packet.stream_index
                numbers[index] += 1
                changed = change(number, packet)
                if changed is not None:
                    changed.stream = streams[index]
                    out.mux(changed)
    return path


def _base(path: Path, **options) -> Path:
    """The path of a source file beside `path`."""
    name = f"base-{path.stem}{options.pop('suffix', path.suffix)}"
    return write(path.with_name(name), **options)


def trimmed_copy(path: Path, at: float = 1.3) -> Path:
    """Cut without encoding: packets from the keyframe before `at`, hidden by an edit list."""

    def change(number: int, packet: av.Packet) -> av.Packet | None:
        begin = 1.0 if packet.stream.type == "video" else at
        if packet.pts * packet.time_base < begin:
            return None
        shift = round(at / packet.time_base)
        packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
        return packet

    base = _base(path, sound=SECONDS, suffix=".mp4", bframes=0)
    return remux(base, path, change, {"avoid_negative_ts": "disabled"})


def trim_end(path: Path, seconds: float) -> Path:
    """Shorten the presentation of every track by its edit list, as phones do."""
    data = bytearray(_base(path, sound=SECONDS).read_bytes())
    at = data.find(b"mvhd") + 4
    scale = struct.unpack(">I", data[at + 12 : at + 16])[0]
    length = struct.pack(">I", round(seconds * scale))
    data[at + 16 : at + 20] = length
    at = 0
    while (at := data.find(b"elst", at + 1)) > 0:
        data[at + 12 : at + 16] = length
    at = 0
    while (at := data.find(b"tkhd", at + 1)) > 0:
        data[at + 24 : at + 28] = length
    path.write_bytes(data)
    return path


def concatenated(path: Path, **options) -> Path:
    """Two concatenated recordings of 2 s; timestamps restart in the second."""
    parts = [_base(path.with_stem(f"{path.stem}{part}"), seconds=2.0, bframes=part * 2, **options) for part in (0, 1)]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def rate_changes(path: Path) -> Path:
    """Two recordings of 2 s whose sound has different rates."""
    parts = [
        _base(path.with_stem(f"{path.stem}{rate}"), seconds=2.0, sound=2.0, sound_rate=rate, bframes=0)
        for rate in (48_000, 22_050)
    ]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    return path


def damaged(path: Path, kind: str, which: Callable[[int], bool], **options) -> Path:
    """Packets of one kind of stream filled with noise."""
    random = np.random.default_rng(0)

    def change(number: int, packet: av.Packet) -> av.Packet:
        if packet.stream.type != kind or not which(number):
            return packet
        bad = av.Packet(random.bytes(packet.size))
        bad.pts, bad.dts, bad.duration, bad.time_base = packet.pts, packet.dts, packet.duration, packet.time_base
        return bad

    return remux(_base(path, bframes=0, **options), path, change)


def shortened(path: Path, share: float, **options) -> Path:
    """The first part of a file."""
    data = _base(path, **options).read_bytes()
    path.write_bytes(data[: round(len(data) * share)])
    return path


def between_keyframes(path: Path) -> Path:
    """A recording that begins with frame 8, where the keyframes are 0, 15, 30, ..."""
    base = _base(path, bframes=0, group=15)
    return remux(base, path, lambda number, packet: None if number < 8 else packet)


def mirrored(path: Path) -> Path:
    """A display matrix that mirrors: the dark quarter is stored at the lower right and displayed at the left."""
    with av.open(str(path.with_suffix(".base.mp4")), "w") as out:
        video = out.add_stream("libx264", rate=RATE, options={"crf": "12"})
        video.width, video.height, video.pix_fmt = 96, 64, "yuv420p"
        image = np.full((64, 96, 3), 200, np.uint8)
        image[32:, 48:] = 20
        for number in range(20):
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts = number
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
    data = bytearray(path.with_suffix(".base.mp4").read_bytes())
    at = data.find(b"tkhd") + 4 + 40
    data[at : at + 4] = struct.pack(">i", -65536)
    path.write_bytes(data)
    return path


def image(path: Path, codec: str, format: str = "image2", frames: int = 1) -> Path:
    """A file with one picture."""
    with av.open(str(path), "w", format=format) as out:
        stream = out.add_stream(codec, rate=10)
        stream.width, stream.height = 64, 48
        stream.pix_fmt = {"mjpeg": "yuvj420p", "png": "rgb24", "gif": "rgb8"}.get(codec, "yuv420p")
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), 60 + 20 * number, np.uint8), format="rgb24")
            frame.pts = number
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path


def text(content: str) -> Callable[[Path], object]:
    """A text file."""
    return lambda path: path.write_text(content)


def replaced(path: Path, old: bytes, new: bytes, **options) -> Path:
    """A clip with some of its bytes replaced."""
    data = _base(path, **options).read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))
    return path


def subtitled(path: Path) -> Path:
    """Subtitles that last longer than picture and sound."""
    base = _base(path, suffix=".mkv")
    srt = path.with_suffix(".srt")
    srt.write_text("1\n00:00:01,000 --> 00:00:09,000\nlong\n")
    with av.open(str(base)) as given, av.open(str(srt)) as words, av.open(str(path), "w") as out:
        streams = [out.add_stream_from_template(given.streams[0]), out.add_stream_from_template(words.streams[0])]
        for packets, stream in zip((list(given.demux()), list(words.demux())), streams):
            for packet in packets:
                if packet.size:
                    packet.stream = stream
                    out.mux(packet)
    return path


VFR = (*range(0, 50, 12), *range(50, 100))
HALF = SECONDS / 2
NOT = "not a video"
PS = {"codec": "mpeg2video", "format": "vob"}

FAST = {
    "cut_copy.mp4": Kind(trimmed_copy, seconds=2.7, begins=1.3),
    "trim_end.mp4": Kind(lambda p: trim_end(p, 2.0), seconds=2.0),
    "no_decoder.mov": Kind(lambda p: replaced(p, b"avc1", b"brvn"), "format that cannot be decoded"),
    "logo.svg": Kind(text('<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'), NOT),
    "notes.txt": Kind(text("a caption, not a video\n" * 50), NOT),
    "still.png": Kind(lambda p: image(p, "png"), NOT),
    "later.mkv": Kind(lambda p: write(p, start=3.0, sound=SECONDS), burst=HALF, aligned=HALF),
    "later.nut": Kind(lambda p: write(p, start=3.0)),
    "wraps.ts": Kind(lambda p: write(p, start=2**33 / 90_000 - 2.0)),
    "audio_longer.mp4": Kind(lambda p: write(p, sound=6.0), seconds=6.0, burst=3.0, aligned=3.0),
    "late_picture.mp4": Kind(
        lambda p: write(p, late=1.0, sound=5.0), seconds=5.0, first=1.0, burst=2.5, aligned=2.5, warning="before its"
    ),
    "late_sound.mp4": Kind(
        lambda p: write(p, sound=2.0, sound_late=1.5), burst=1.0, aligned=2.5, warning="1.5. s after its picture|1.48 s"
    ),
    "gap.mkv": Kind(lambda p: write(p, sound=SECONDS, gap=(0.5, 1.5)), burst=1.0, aligned=2.0, warning=r"1 gap\(s\)"),
    "variable_rate.mp4": Kind(lambda p: write(p, times=VFR)),
    "joined.ts": Kind(concatenated, falls=True),
    "dropped.avi": Kind(lambda p: write(p, codec="mpeg4", times=VFR)),
    "live.m3u8": Kind(text("#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3.0,\njoined.ts\n"), NOT),
    "one_sound_packet.mkv": Kind(
        lambda p: damaged(p, "audio", lambda n: n == 20, sound=SECONDS), burst=HALF, warning="sound are damaged"
    ),
    "one_picture_packet.mkv": Kind(
        lambda p: damaged(p, "video", lambda n: n == 60, group=10), warning="^([1-9]|10) of 100"
    ),
    "mirrored.mp4": Kind(mirrored, seconds=0.8),
}
SLOW = {
    "cut_copy.mov": Kind(trimmed_copy, seconds=2.7, begins=1.3),
    "trim_end.mov": Kind(lambda p: trim_end(p, 3.0), seconds=3.0),
    "no_decoder.mkv": Kind(
        lambda p: replaced(p, b"V_MPEG4/ISO/AVC", b"V_XYZW4/ISO/AVC"), "format that cannot be decoded"
    ),
    "still.jpg": Kind(lambda p: image(p, "mjpeg"), NOT),
    "animated.webp": Kind(lambda p: image(p, "libwebp_anim", "webp", 4), "WebP"),
    "words.srt": Kind(text("1\n00:00:01,000 --> 00:00:02,000\nhello\n"), NOT),
    "words.ass": Kind(text("[Script Info]\nScriptType: v4.00+\n\n[Events]\n"), NOT),
    "page.html": Kind(text("<!doctype html><html><body>404</body></html>"), NOT),
    "list.ffconcat": Kind(text("ffconcat version 1.0\nfile joined.ts\n"), NOT),
    "list.mpd": Kind(text('<?xml version="1.0"?>\n<MPD xmlns="urn:mpeg:dash:schema:mpd:2011"></MPD>\n'), NOT),
    "call.sdp": Kind(text("v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n"), NOT),
    "absolute.m3u8": Kind(text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5.0,\n/etc/passwd\n#EXT-X-ENDLIST\n"), NOT),
    "later.webm": Kind(lambda p: write(p, codec="libvpx", start=3.0)),
    "hour_later.mkv": Kind(lambda p: write(p, start=3600.0)),
    "later.wmv": Kind(lambda p: write(p, codec="wmv2", start=3.0)),
    "later.ts": Kind(lambda p: write(p, start=3.0, sound=SECONDS), burst=HALF, aligned=HALF),
    "later.mpg": Kind(lambda p: write(p, start=30.0, **PS)),
    "later.flv": Kind(lambda p: write(p, codec="flv", start=3.0)),
    "later_fragments.mp4": Kind(
        lambda p: write(p, start=100.0, options={"movflags": "frag_keyframe+empty_moov", "use_editlist": "0"})
    ),
    "plain.avi": Kind(lambda p: write(p, codec="mpeg4")),
    "wraps_with_sound.ts": Kind(
        lambda p: write(p, start=2**33 / 90_000 - 2.0, sound=SECONDS), burst=HALF, aligned=HALF
    ),
    "late_picture.mkv": Kind(
        lambda p: write(p, late=1.0, sound=5.0), seconds=5.0, first=1.0, burst=2.5, warning="before its picture"
    ),
    "late_sound.mkv": Kind(
        lambda p: write(p, sound=2.0, sound_late=1.5), burst=1.0, aligned=2.5, warning="after its picture"
    ),
    "late_sound.ts": Kind(
        lambda p: write(p, sound=2.0, sound_late=1.5), burst=1.0, aligned=2.5, warning="after its picture"
    ),
    "gap.mp4": Kind(lambda p: write(p, sound=SECONDS, gap=(0.5, 1.5)), burst=1.0, aligned=2.0, warning=r"1 gap\(s\)"),
    "gap.ts": Kind(lambda p: write(p, sound=SECONDS, gap=(0.5, 1.5)), burst=1.0, aligned=2.0, warning=r"1 gap\(s\)"),
    "variable_rate.mkv": Kind(lambda p: write(p, times=VFR)),
    "subtitled.mkv": Kind(subtitled),
    "joined.mpg": Kind(lambda p: concatenated(p, **PS), falls=True),
    "joined_with_sound.ts": Kind(lambda p: concatenated(p, sound=2.0), falls=True),
    "rate_changes.ts": Kind(rate_changes, falls=True),
    "tenth_lost.mkv": Kind(lambda p: damaged(p, "video", lambda n: n % 10 == 9, group=5), warning="10 of 100"),
    "most_lost.mkv": Kind(lambda p: damaged(p, "video", lambda n: n % 2 == 1, group=5), "damaged"),
    "sound_lost.mkv": Kind(lambda p: damaged(p, "audio", lambda n: n % 2 == 1, sound=SECONDS), "damaged"),
    "between_keyframes.ts": Kind(between_keyframes, seconds=3.68, first=0.28, begins=0.6, warning="7 of 92"),
    "half.mkv": Kind(lambda p: shortened(p, 0.5, options={"cluster_time_limit": "500"}), "cut short"),
    "half_faststart.mp4": Kind(lambda p: shortened(p, 0.5, options={"movflags": "faststart"}), "cut short"),
    "half.avi": Kind(lambda p: shortened(p, 0.5, codec="mpeg4"), "cut short"),
    "half.wmv": Kind(lambda p: shortened(p, 0.5, codec="wmv2"), "cut short"),
    "half.mp4": Kind(lambda p: shortened(p, 0.5), "cut off"),
    "enormous.mkv": Kind(lambda p: enormous(p), "the limit is .* pixels"),
}


def enormous(path: Path) -> None:
    """One frame of 8,208 x 8,192 pixels."""
    with av.open(str(path), "w", format="matroska") as out:
        video = out.add_stream("mjpeg", rate=1)
        video.width, video.height, video.pix_fmt = 8_208, 8_192, "yuvj420p"
        frame = av.VideoFrame(8_208, 8_192, "yuvj420p")
        frame.pts = 0
        out.mux(video.encode(frame))
        out.mux(video.encode(None))

"""Container level of clips: accepted formats, a continuous timeline for packets, and detection of missing packets."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av

from avocado_jax.errors import InputError

# Demuxers of video and audio files. Playlists and scripts (hls, dash, concat, sdp), texts, images and devices are
# excluded, so that no file other than the given one is opened.
FORMATS = (
    "mov,mp4,matroska,webm,avi,asf,asf_o,flv,live_flv,mpegts,mpeg,mpegvideo,m4v,h261,h263,h264,hevc,vvc,av1,obu,ivf,"
    "vc1,vc1test,dirac,mjpeg,cavsvideo,avs2,avs3,ogg,nut,rm,mxf,mxf_opatom,gxf,wtv,dv,swf,gif,apng,yuv4mpegpipe,nsv,"
    "nuv,pva,roq,smk,bink,thp,film_cpk,4xm,ipmovie,rpl,ea,psxstr,xmv,viv,"
    "wav,w64,mp3,flac,aac,aiff,au,caf,amr,amrnb,amrwb,ac3,eac3,dts,truehd,ape,wv,tta,tak,mpc,mpc8,loas"
)
MOST_PIXELS = 8192 * 8192  # maximum pixels of a frame: above 8K, and small enough for a decoder's memory
BACKWARD = 0.5  # seconds; decoding times that step back further have restarted
BLOCK = 2048  # maximum bytes between two packets of a matroska file
FORWARD = 10.0  # seconds; decoding times that step further have jumped, in formats with changing clocks
LOST = 0.25  # maximum share of missing frames; clips with more damage are rejected
INDEXED = ("mp4", "matroska")  # formats that support seeking
STILLS = (b"avif", b"heic", b"heix", b"mif1")


def printable(path: str | Path) -> str:
    """Escape newlines, control characters and undecodable bytes of a path."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(path))


@contextmanager
def one_line(path: Path) -> Iterator[None]:
    """Convert any exception about one clip to an InputError with a one-line message that names the clip."""
    try:
        _check_file(path)
        yield
    except InputError as error:
        raise InputError(f"{printable(path)}: {error}") from error
    except MemoryError as error:
        raise InputError(f"{printable(path)}: not enough memory to read it") from error
    except (av.error.FFmpegError, ValueError, OSError) as error:
        reason = " ".join(str(getattr(error, "strerror", None) or error).split())
        raise InputError(f"{printable(path)}: damaged, cannot be decoded ({reason})") from error
    except Exception as error:  # one file must not stop the other clips
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"{printable(path)}: cannot be read ({reason})") from error


def _check_file(path: Path) -> None:
    try:
        size = os.stat(path).st_size
    except FileNotFoundError:
        raise InputError("no such file") from None
    except ValueError:
        raise InputError("no such file (its name contains a NUL character)") from None
    except OSError as error:
        raise InputError(f"cannot be opened ({error.strerror})") from None
    if not path.is_file():  # opening a pipe would block
        raise InputError("is a folder" if path.is_dir() else "is not a file")
    if size == 0:
        raise InputError("is empty (zero bytes)")
    if not os.access(path, os.R_OK):
        raise InputError("no permission to read it")


def open_clip(path: Path) -> av.container.InputContainer:
    """Open a media file, without following references to other files or addresses.

    The `file:` scheme accepts any name (`12:30.mp4` is not a protocol). Metadata may have any encoding.
    """
    allowed = {"format_whitelist": FORMATS, "protocol_whitelist": "file"}
    try:
        return av.open(f"file:{path}", options=allowed, metadata_errors="replace")
    except (av.error.InvalidDataError, av.error.ArgumentError) as error:
        if _head(path)[8:12] == b"WEBP":
            raise InputError("not a video: WebP images, animated or not, cannot be decoded") from error
        if isinstance(error, av.error.ArgumentError):  # rejected by the whitelist
            raise InputError("not a video: playlists, scripts, images and texts are not read") from error
        raise InputError("not a video, or its header is damaged or cut off") from error


def _head(path: Path, length: int = 65_536) -> bytes:
    with path.open("rb") as file:
        return file.read(length)


def video_stream(container: av.container.InputContainer) -> av.VideoStream:
    """Select the video stream by FFmpeg's rule. Cover images are not video streams.

    Raises:
        InputError: the clip has no video stream, no decoder supports it, or its frames are too large.
    """
    stream = container.streams.best("video")
    if stream is None:  # `best` skips streams without a decoder
        stream = next(iter(container.streams.video), None)
    if stream is None or stream.disposition & av.stream.Disposition.attached_pic:
        raise InputError("has no picture" + (" (sound only)" if container.streams.audio else ""))
    if stream.codec_context is None:
        raise InputError("its picture is in a format that cannot be decoded")
    check_size(stream.codec_context.width, stream.codec_context.height)
    return stream


def check_size(width: int, height: int) -> None:
    """Raise InputError if a frame has too many pixels."""
    if width * height > MOST_PIXELS:
        raise InputError(f"a picture of {width}x{height}: the limit is {MOST_PIXELS} pixels")


def frame_rate(stream: av.VideoStream) -> float:
    """Frames per second."""
    return float(stream.average_rate or stream.base_rate or 25)


def _demux(container: av.container.InputContainer) -> Iterator[av.Packet]:
    """Yield all packets. After the last one PyAV raises IndexError if a stream appeared while reading."""
    packets = container.demux()
    while True:
        try:
            packet = next(packets, None)
        except IndexError:
            return
        if packet is None:
            return
        yield packet


class Clock:
    """Maps the packets of a container to one continuous timeline.

    If decoding times restart or jump, as in concatenated recordings, the following packets are shifted so that they
    continue at the end of the previous ones. Streams that jump by the same amount get the same shift and stay in sync.
    The times of mp4 files follow from their edit lists and are not changed.
    """

    def __init__(self, container: av.container.InputContainer) -> None:
        self._fixed = "mp4" in container.format.name
        self._forward = FORWARD if container.format.flags & av.format.Flags.ts_discont.value else float("inf")
        self._shifts, self._shift_of, self._last, self._end = [0.0], {}, {}, float("-inf")

    @property
    def shifted(self) -> bool:
        """Whether packet times were changed."""
        return len(self._shifts) > 1

    def packets(
        self, container: av.container.InputContainer, only: av.stream.Stream | None = None
    ) -> Iterator[av.Packet]:
        """Yield non-empty packets, of all streams or of one, in file order, with continuous times."""
        for packet in _demux(container):
            if packet.size:
                if not self._fixed and packet.stream.type in ("video", "audio"):
                    self._shift(packet)
                if only is None or packet.stream_index == only.index:
                    yield packet

    def _shift(self, packet: av.Packet) -> None:
        stream, tick = packet.stream_index, float(packet.time_base)
        number = self._shift_of.setdefault(stream, len(self._shifts) - 1)
        if packet.dts is not None:
            time = packet.dts * tick
            last = self._last.get(stream)
            if last is not None and not self._continues(last, time + self._shifts[number], packet):
                shown = (packet.dts if packet.pts is None else packet.pts) * tick
                later = range(number + 1, len(self._shifts))
                number = next((n for n in later if self._continues(last, time + self._shifts[n], packet)), None)
                if number is None:
                    self._shifts.append(self._end - shown)
                    number = len(self._shifts) - 1
                self._shift_of[stream] = number
            self._last[stream] = time + self._shifts[number]
        if shift := round(self._shifts[number] / tick):
            if packet.dts is not None:
                packet.dts += shift
            if packet.pts is not None:
                packet.pts += shift
        if packet.pts is not None:
            self._end = max(self._end, (packet.pts + (packet.duration or 0)) * tick)

    def _continues(self, last: float, time: float, packet: av.Packet) -> bool:
        most = max(self._forward, 3 * float((packet.duration or 0) * packet.time_base))
        return -BACKWARD <= time - last <= most


class Packets(NamedTuple):
    """Information from demuxing, without decoding."""

    frames: int  # video packets to show
    missing: int  # frames that the file declares but does not contain
    times: list[int] | None  # sorted presentation times of the frames in ticks; None if unknown
    origin: float  # start of the first stream (video or audio) in seconds
    seconds: float  # duration from `origin` to the end of the last stream
    rate: float  # frames per second
    tick: float = 0.0  # seconds per tick of `times` and `keys`
    keys: tuple[int, ...] = ()  # presentation times of key frames in ticks
    seekable: bool = False  # whether the file has an index and its times were not changed
    start: float = 0.0  # start of a part in seconds from the beginning of the clip
    first_key: int | None = None  # key frame at which decoding of a part starts

    def time(self, ticks: int, tick: float) -> float:
        """Convert ticks to seconds since the beginning of the clip."""
        return ticks * tick - self.origin

    def part(self, start: float, end: float) -> "Packets":
        """Select the frames from `start` (inclusive) to `end` (exclusive). Times are relative to `start`.

        Raises:
            InputError: the interval has no frames.
        """
        times = [stamp for stamp in self.times or () if start <= self.time(stamp, self.tick) < end]
        if not times:
            raise InputError(f"no frame whose time is known from {start:.2f} to {end:.2f} s")
        return self._replace(
            frames=len(times),
            missing=0,
            times=times,
            origin=self.origin + start,
            start=start,
            keys=(),
            seconds=min(end, self.seconds) - start,
            first_key=max((key for key in self.keys if key <= times[0]), default=min(self.keys, default=times[0])),
        )


def scan(path: Path) -> Packets:
    """Read the packets of a clip without decoding them.

    Raises:
        InputError: the clip has no frames, is encrypted, or more than a share of `LOST` is missing.
    """
    with open_clip(path) as container:
        stream = video_stream(container)
        rate, frames, times, keys, clock = frame_rate(stream), 0, [], [], Clock(container)
        last = skipped = read = 0  # in bytes
        reach = 0.0  # latest time of any stream
        spans: dict[int, list[float]] = {}
        try:
            for packet in clock.packets(container):
                if last and packet.pos is not None and packet.pos - last > BLOCK:
                    skipped += packet.pos - last
                read += packet.size
                last = max(last, (packet.pos or 0) + packet.size)
                if packet.pts is not None:  # including subtitles
                    reach = max(reach, float((packet.pts + (packet.duration or 0)) * packet.time_base))
                if packet.stream.type not in ("video", "audio") or packet.is_discard:
                    continue
                if packet.has_sidedata("encryption_info"):
                    raise InputError("is encrypted")
                picture = packet.stream_index == stream.index
                if picture:
                    frames += 1
                    times.append(packet.pts)
                    if packet.is_keyframe and packet.pts is not None:
                        keys.append(packet.pts)
                if packet.pts is not None and (picture or packet.stream.type == "audio"):
                    tick, span = float(packet.time_base), spans.setdefault(packet.stream_index, [float("inf"), 0.0])
                    length = packet.duration * tick if packet.duration else picture / rate
                    span[:] = min(span[0], packet.pts * tick), max(span[1], packet.pts * tick + length)
        except av.error.FFmpegError as error:
            if not frames:
                raise
            if last / path.stat().st_size < 1 - LOST:
                raise InputError(f"damaged, cannot be decoded ({error.strerror})") from error
        if not frames:
            raise InputError("its picture has no frames")
        if _head(path, 12)[8:] in STILLS and frames == 1:
            raise InputError("not a video: a still image")
        for audio in container.streams.audio:  # samples before the start time are encoder delay
            if audio.index in spans and audio.start_time is not None:
                spans[audio.index][0] = max(spans[audio.index][0], float(audio.start_time * audio.time_base))
        origin = min((span[0] for span in spans.values()), default=0.0)
        end = max((span[1] for span in spans.values()), default=origin + frames / rate)
        stated = container.duration / av.time_base if container.duration else 0.0
        lost = _lost(path, container, stream, frames, last, origin, max(end, reach), stated)
        if "matroska" in container.format.name:  # packets are contiguous: bytes between them are unreadable
            lost = max(lost, skipped / (skipped + read))
        missing = round(frames * lost / (1 - lost)) if lost < 1 else frames
        if lost > LOST:
            raise InputError(
                f"cut short or damaged: {frames} of {stream.frames or 'its'} frames, "
                f"{end - origin:.1f} s of {stated:.1f} s"
            )
        seconds = stated if abs(stated - (end - origin)) < 0.1 else end - origin  # the last packets may be padded
        known = None not in times and len(set(times)) == frames
        tick = float(stream.time_base)
        seekable = not clock.shifted and any(name in container.format.name for name in INDEXED)
        known_times = sorted(times) if known else None
        return Packets(frames, missing, known_times, origin, seconds, rate, tick, tuple(keys), seekable)


def _lost(
    path: Path,
    container: av.container.InputContainer,
    stream: av.VideoStream,
    frames: int,
    last: int,
    origin: float,
    end: float,
    stated: float,
) -> float:
    """Estimate the missing share of a truncated file from the sizes in its container.

    mp4 has the offset of every frame; matroska, AVI and ASF have the file size. Durations have different meanings in
    different files and are used only if bytes are missing or, in matroska, were not read. Other formats contain no
    sizes.
    """
    size, name = path.stat().st_size, container.format.name
    if "mp4" in name:
        entries = stream.index_entries or ()
        beyond = sum(entry.pos + entry.size > size for entry in entries)
        return beyond / len(entries) if beyond else 0.0
    filesize = container.metadata.get("filesize", "").split(".")[0]  # FLV only
    declared = _declared_bytes(path, name) or (int(filesize) if filesize.isdecimal() else 0)
    if declared <= size and not ("matroska" in name and size - last > BLOCK):
        return 0.0
    if name == "avi" and stream.frames:  # frame slots; some may be empty
        return max(0.0, 1 - max(frames, round(end * frame_rate(stream))) / stream.frames)
    if "matroska" in name and stated:  # the duration or the end time
        return max(0.0, 1 - max((end - origin) / stated, (end - origin) / max(stated - origin, 1e-3)))
    return max(0.0, 1 - size / declared) if declared else 0.0


def _declared_bytes(path: Path, name: str) -> int:
    """The file size in the headers of the file; 0 if unknown."""
    head = _head(path)
    if "matroska" in name:
        at = head.find(b"\x18\x53\x80\x67")
        if at < 0 or len(head) < at + 12 or not head[at + 4]:
            return 0
        width = 9 - head[at + 4].bit_length()
        value = int.from_bytes(head[at + 4 : at + 4 + width]) & ((1 << 7 * width) - 1)
        return 0 if value == (1 << 7 * width) - 1 else at + 4 + width + value  # all ones: unknown, as in a live stream
    if name == "avi":
        at, size = 0, path.stat().st_size
        with path.open("rb") as file:
            while at + 8 <= size:  # files above 1 GB have several RIFF chunks
                file.seek(at)
                chunk = file.read(8)
                if chunk[:4] != b"RIFF":
                    break
                at += 8 + int.from_bytes(chunk[4:], "little")
        return at
    if name.startswith("asf"):
        at = head.find(bytes.fromhex("a1dcab8c47a9cf118ee400c00c205365"))
        if at < 0 or len(head) < at + 92 or head[at + 88] & 1:  # broadcasts have no size
            return 0
        return int.from_bytes(head[at + 40 : at + 48], "little")
    return 0

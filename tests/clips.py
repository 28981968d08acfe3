"""Small clips written with PyAV: valid ones of many kinds, and files with many kinds of damage.

Everything is deterministic: a picture whose four quarters have their own colours, with a white square that
moves over them, and a tone of its own pitch in each channel.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import av
import numpy as np

RATE = 10  # frames a second
SOUND = 44_100  # samples a second
QUARTERS = ((200, 40, 40), (40, 200, 40), (40, 40, 200), (200, 200, 40))  # top left, top right, bottom left, ...


def picture(index: int, width: int = 96, height: int = 64) -> np.ndarray:
    """Frame `index`: four coloured quarters and a moving square."""
    image = np.zeros((height, width, 3), np.uint8)
    for colour, (rows, columns) in zip(QUARTERS, ((0, 0), (0, 1), (1, 0), (1, 1))):
        half, wide = height // 2, width // 2
        image[rows * half : (rows + 1) * half + 1, columns * wide : (columns + 1) * wide + 1] = colour
    size = max(4, height // 8)
    left, top = index * 5 % (width - size), index * 3 % (height - size)
    image[top : top + size, left : left + size] = 255
    return image


def tone(seconds: float, rate: int = SOUND, channels: int = 1) -> np.ndarray:
    """[channels, samples] in -1..1: a sine of 220 Hz in the first channel, 330 Hz in the second, and so on."""
    time = np.arange(round(seconds * rate)) / rate
    return np.stack([0.4 * np.sin(2 * np.pi * 110 * (channel + 2) * time) for channel in range(channels)]).astype("f4")


def write(
    path: Path,
    frames: int = 20,
    width: int = 96,
    height: int = 64,
    rate: int = RATE,
    sound: np.ndarray | None = None,
    sound_rate: int = SOUND,
    layout: str = "mono",
    codecs: tuple[str, str] = ("libx264", "aac"),
    times: Sequence[int] | None = None,
    turned: int = 0,
    options: dict[str, str] | None = None,
    draw: Callable[..., np.ndarray] = picture,
) -> Path:
    """Write a clip.

    Args:
        sound: [channels, samples], or None for no audio stream.
        times: presentation times in hundredths of a second, for a variable rate.
        turned: the picture is stored turned, with a display rotation that sets it upright: 0, 90, 180, 270.
    """
    with av.open(str(path), "w", options=options or {}) as out:
        audio = out.add_stream(codecs[1], rate=sound_rate, layout=layout) if sound is not None else None
        if frames:
            video = out.add_stream(codecs[0], rate=100 if times else rate, options={"crf": "10"})
            stored = (height, width) if turned in (90, 270) else (width, height)
            video.width, video.height, video.pix_fmt = *stored, "yuv420p"
            video.codec_context.thread_count = 1
            if codecs[0] == "libx264":
                video.options = {"crf": "10", "preset": "ultrafast", "g": "12"}
            if turned:
                video.set_display_rotation(turned)
        for index in range(frames):
            image = np.rot90(draw(index, width, height), k=-turned // 90)
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
            frame.pts = times[index] if times else index
            out.mux(video.encode(frame))
        if frames:
            out.mux(video.encode(None))
        if audio is not None:
            _encode_sound(out, audio, sound, sound_rate, layout)
    return path


def _encode_sound(
    out: av.container.OutputContainer, audio: av.AudioStream, sound: np.ndarray, rate: int, layout: str
) -> None:
    resampler = av.AudioResampler(audio.format, layout, audio.rate)
    for start in range(0, sound.shape[1], 1024):
        block = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound[:, start : start + 1024]), "fltp", layout)
        block.sample_rate, block.pts = rate, start
        for ready in resampler.resample(block):
            out.mux(audio.encode(ready))
    for ready in resampler.resample(None):
        out.mux(audio.encode(ready))
    out.mux(audio.encode(None))


def halved(source: Path, path: Path) -> Path:
    """Write the first half of a file."""
    data = source.read_bytes()
    path.write_bytes(data[: len(data) // 2])
    return path


def spoiled(source: Path, path: Path) -> Path:
    """Write a file whose middle third is replaced by noise."""
    data = bytearray(source.read_bytes())
    third = len(data) // 3
    data[third : 2 * third] = np.random.default_rng(0).bytes(third)
    path.write_bytes(data)
    return path


def covered(path: Path) -> Path:
    """Write sound with a cover picture, as in music files."""
    with av.open(str(path), "w", format="mp4") as out:
        audio = out.add_stream("aac", rate=SOUND, layout="mono")
        cover = out.add_stream("mjpeg", rate=1)
        cover.width, cover.height, cover.pix_fmt = 96, 64, "yuvj420p"
        cover.disposition = av.stream.Disposition.attached_pic
        frame = av.VideoFrame.from_ndarray(picture(0), format="rgb24")
        frame.pts = 0
        out.mux(cover.encode(frame))
        out.mux(cover.encode(None))
        _encode_sound(out, audio, tone(2), SOUND, "mono")
    return path


FRAME_TIMES = (0, 10, 15, 50, 52, 54, 80, 100, 180, 190, 200, 201, 203, 260, 270, 280, 281, 290, 295, 300)

# Name to what writes it.
GOOD: dict[str, Callable[[Path], Path]] = {
    "plain.mp4": lambda path: write(path, sound=tone(2)),
    "no_sound.mp4": lambda path: write(path),
    "longer_sound.mp4": lambda path: write(path, sound=tone(5)),
    "shorter_sound.mp4": lambda path: write(path, sound=tone(0.5)),
    "odd.mp4": lambda path: write(path, frames=37, width=130, height=94),
    "one_frame.mp4": lambda path: write(path, frames=1),
    "two_frames.mp4": lambda path: write(path, frames=2),
    "portrait.mp4": lambda path: write(path, width=64, height=96),
    "turned_90.mp4": lambda path: write(path, turned=90, sound=tone(2)),
    "turned_180.mp4": lambda path: write(path, turned=180),
    "turned_270.mp4": lambda path: write(path, turned=270),
    "variable_rate.mp4": lambda path: write(path, times=FRAME_TIMES),
    "8_khz.mp4": lambda path: write(path, sound=tone(2, 8000), sound_rate=8000),
    "five_one.mp4": lambda path: write(path, sound=tone(2, 48000, 6), sound_rate=48000, layout="5.1"),
    "five_one.mkv": lambda path: write(
        path, sound=tone(2, 48000, 6), sound_rate=48000, layout="5.1", codecs=("libx264", "flac")
    ),
    "100_s.mp4": lambda path: write(path, frames=110, rate=1, sound=tone(110, 8000), sound_rate=8000),
    "4k.mp4": lambda path: write(path, frames=4, width=3840, height=2160),
    "silent.mp4": lambda path: write(path, sound=0 * tone(2)),
    "Ünïcode 视频 🎬.mp4": lambda path: write(path),
    "12:30 100%d.mp4": lambda path: write(path),
    "faststart.mp4": lambda path: write(path, sound=tone(2), options={"movflags": "faststart"}),
    "fragmented.mp4": lambda path: write(path, sound=tone(2), options={"movflags": "frag_keyframe+empty_moov"}),
    "vp9.webm": lambda path: write(path, sound=tone(2, 48000), sound_rate=48000, codecs=("libvpx-vp9", "libopus")),
    "plain.mkv": lambda path: write(path, sound=tone(2)),
    "pcm.mov": lambda path: write(path, sound=tone(2), codecs=("libx264", "pcm_s16le")),
    "bytes.mkv": lambda path: write(path, sound=tone(2), codecs=("libx264", "pcm_u8")),
    "mpeg4.avi": lambda path: write(path, sound=tone(2), codecs=("mpeg4", "pcm_s16le")),
    "bare.h264": lambda path: write(path),
    "slow.webm": lambda path: write(path, frames=5, times=(0, 200, 400, 600, 800), codecs=("libvpx", "libopus")),
}

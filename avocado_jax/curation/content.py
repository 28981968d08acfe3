"""Encode a clip as content parts of the OpenAI chat protocol: frames as JPEG images, sound as WAV."""

import base64
import io
import json
import wave
from fractions import Fraction
from typing import Any

import av
import numpy as np

from avocado_jax.data.media import Media, Reading
from avocado_jax.typing import Array, Float, Shaped

SILENT = 1e-3  # peak level below which a clip counts as silent, relative to full scale
QUALITY = 3  # JPEG quantiser scale, 1 (best) to 31
Parts = list[dict[str, Any]]


def picture_parts(media: Media) -> Parts:
    """The frames of a clip; a text part with the time precedes each."""
    times = frame_times(len(media.frames), media.seconds) if media.times is None else media.times
    parts = [text_part(json.dumps({"seconds": round(media.seconds, 2), "frames": len(times)}))]
    for time, frame in zip(times, media.frames):
        url = f"data:image/jpeg;base64,{base64.b64encode(jpeg(frame)).decode()}"
        parts += [text_part(f"{time:.2f} s"), {"type": "image_url", "image_url": {"url": url}}]
    return parts


def sound_parts(media: Media, reading: Reading) -> Parts:
    """The sound of a clip; it must have some."""
    data = base64.b64encode(wav(media.samples, reading.sound_rate)).decode()
    duration = text_part(json.dumps({"seconds": round(media.seconds, 2)}))
    return [duration, {"type": "input_audio", "input_audio": {"data": data, "format": "wav"}}]


def text_part(text: str) -> dict[str, Any]:
    """A text part."""
    return {"type": "text", "text": text}


def silent(media: Media) -> bool:
    """Whether a clip has no sound, or only silence."""
    return media.samples is None or not len(media.samples) or float(np.abs(media.samples).max()) < SILENT


def frame_times(count: int, seconds: float) -> list[float]:
    """Times of the sampled frames in seconds, evenly spaced; accurate to one frame of the file."""
    return [seconds * number / max(1, count - 1) for number in range(count)]


def jpeg(frame: Shaped[Array, "h w 3"]) -> bytes:
    """Encode a picture (uint8 RGB) as JPEG, deterministically."""
    codec = av.CodecContext.create("mjpeg", "w")
    codec.height, codec.width = frame.shape[:2]
    codec.pix_fmt, codec.time_base, codec.thread_count = "yuvj420p", Fraction(1, 25), 1
    codec.qmin = codec.qmax = QUALITY
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24").reformat(format="yuvj420p")
    return b"".join(bytes(packet) for packet in [*codec.encode(picture), *codec.encode(None)])


def wav(samples: Float[Array, "n"], rate: int) -> bytes:
    """Encode mono sound (-1..1) as 16-bit WAV."""
    file = io.BytesIO()
    with wave.open(file, "wb") as out:
        out.setparams((1, 2, rate, 0, "NONE", ""))
        out.writeframes((np.clip(samples, -1, 1) * 32767).round().astype("<i2").tobytes())
    return file.getvalue()

"""Clips as manifest records, mp4 files or arrays."""

import os
from collections.abc import Iterable
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np

from avocado_jax.errors import InputError
from avocado_jax.world.caption import (
    capitalize,
    clause,
    cross_clause,
    plain_caption,
    punctuate,
    statement,
    write_caption,
)
from avocado_jax.world.director import make_script
from avocado_jax.world.lexicon import THEN
from avocado_jax.world.probes import make_probes
from avocado_jax.world.render import frame_times, render
from avocado_jax.world.script import LEVELS, Event, Script
from avocado_jax.world.sound import mix
from avocado_jax.world.timing import REQUEST, timed_caption
from avocado_jax.world.vocabulary import VISUALS
from avocado_jax.world.voice import RATE

PROMPTS = (
    "Describe everything that can be seen and heard in this video, in the order it happens.",
    "Please give a full account of the video: the pictures, the sounds and what is said.",
    "What happens in this clip? Cover the visuals, the audio and how they line up.",
    "Write a detailed caption of the video, with every line of dialogue and who speaks it.",
)
KINDS = {"effect": "audio", "bed": "audio", "say": "speech", "cross": "cross"}  # all others: "visual"
DIMENSIONS = {
    "present": "static",
    "text": "static",
    "effect": "auditory",
    "bed": "auditory",
    "say": "auditory",
    "scene": "spatiotemporal",
    "cut": "spatiotemporal",
    "camera": "spatiotemporal",
} | dict.fromkeys(VISUALS, "dynamic")


# asm=0: the vector code of x264 is not deterministic (2 of 200 clips differ, in a corner of the picture).
H264 = {"preset": "veryfast", "crf": "20", "x264-params": "asm=0"}


class Row(NamedTuple):
    """A clip as arrays.

    Attributes:
      frames: uint8 [N, H, W, 3]; frame k is at k / fps seconds.
      samples: float32 [duration * 16000], mono, -1..1.
      record: the manifest line.
    """

    frames: np.ndarray
    samples: np.ndarray
    record: dict


def record(script: Script, references: int = 1, timestamps: bool = False) -> dict:
    """The manifest line of a clip with all optional fields; `video` is relative to the manifest.

    `caption` is the first of `references` captions. With 0 references it is the plain caption, for models too small to
    learn varied wording. With `timestamps` it is the caption with times, and the prompt requests them. Requires neither
    files nor the speech library.
    """
    prompt = PROMPTS[script.index % len(PROMPTS)]
    captions = [write_caption(script, which) for which in range(references)] or [plain_caption(script.events)]
    if timestamps:
        captions, prompt = [timed_caption(script.events)], f"{prompt} {REQUEST}"
    spoken = [event for event in script.events if event.kind == "say"]
    return {
        "id": script.id,
        "video": f"clips/{script.id}.mp4",
        "caption": captions[0],
        "prompt": prompt,
        "references": captions,
        "events": [
            {"text": statement(e), "start": e.start, "end": e.end, "kind": KINDS.get(e.kind, "visual")}
            for e in script.events
        ],
        "dialogues": [
            {"speaker": f"the {e.get('who')}", "text": e.get("line"), "start": e.start, "end": e.end} for e in spoken
        ],
        "keypoints": keypoints(script),
        "probes": make_probes(script, DIMENSIONS),
    }


def keypoints(script: Script) -> list[dict]:
    """Atomic facts in the paper's five dimensions, as sentences that `check` can parse."""
    points = []
    for event in script.events:
        for part in event.parts or (event,):
            points.append({"text": statement(part), "dimension": DIMENSIONS[part.kind]})
        if event.parts:
            points.append({"text": punctuate(capitalize(cross_clause(event))), "dimension": "crossmodal"})
    for first, second in pairwise(script.events):
        if _happens(first) and _happens(second):
            text = punctuate(capitalize(THEN[0].format(x=clause(first), y=clause(second))))
            points.append({"text": text, "dimension": "spatiotemporal"})
            break
    return points


def _happens(event: Event) -> bool:
    return event.kind in (*VISUALS, "effect", "text", "camera")


def row(seed: int, index: int, split: str = "train", level: int = 1, fps: float = 2.0, references: int = 1) -> Row:
    """A clip as arrays at `fps`, without writing a file and without compression."""
    script = make_script(seed, index, split, level)
    frames = np.stack(list(render(script, frame_times(script, fps))))
    return Row(frames, mix(script), record(script, references))


def write_clip(script: Script, path: Path) -> None:
    """Write a clip as mp4 with an H.264 stream and an AAC stream (mono, 16 kHz).

    The file is renamed to `path` when it is complete. The bytes are deterministic, for any number of cores. Raises as
    `write_mp4`.
    """
    level = LEVELS[script.level]
    write_mp4(path, render(script), level.size, level.fps, mix(script))


def write_mp4(
    path: Path, pictures: Iterable[np.ndarray], size: tuple[int, int], fps: int | Fraction, samples: np.ndarray | None
) -> None:
    """Write pictures (uint8 [H, W, 3], of this size) at `fps`, and optional mono sound at 16 kHz, as mp4.

    The file is renamed to `path` when it is complete.

    Raises:
      InputError: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise InputError("writing mp4 files needs PyAV: pip install av") from None
    (height, width), per_frame = size, RATE / fps
    part = path.with_name(path.name + ".part")
    with av.open(str(part), "w", format="mp4") as container:
        picture = container.add_stream("libx264", rate=fps, options=H264)
        picture.width, picture.height, picture.pix_fmt = width, height, "yuv420p"
        streams = [picture]
        if samples is not None:
            sound = container.add_stream("aac", rate=RATE, layout="mono", bit_rate=64000)
            streams.append(sound)
        for stream in streams:
            stream.codec_context.thread_count = 1
        for k, pixels in enumerate(pictures):
            container.mux(picture.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
            if samples is None:
                continue
            begin, stop = round(k * per_frame), round((k + 1) * per_frame)
            frame = av.AudioFrame.from_ndarray(samples[None, begin:stop].copy(), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = RATE, begin
            container.mux(sound.encode(frame))
        for stream in streams:
            container.mux(stream.encode(None))
    os.replace(part, path)

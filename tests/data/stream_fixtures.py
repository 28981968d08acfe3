"""Fixtures of the input tests: a tokenizer, small clips, records, a folder of shards."""

import json
import os
import sys
import time
from pathlib import Path

import av
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from avocado_jax.data.media import Reading
from avocado_jax.data.pipeline import Recipe
from avocado_jax.data.tokenizer import SPECIAL
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY

READING = Reading(fewest_pixels=28 * 28, most_pixels=4 * 28 * 28, clip_pixels=400 * 28 * 28)  # frames of a few patches


def byte_tokenizer() -> Tokenizer:
    """A tokenizer with one token per byte, followed by Qwen's special tokens."""
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(characters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return tokenizer


def contiguous_rows(host: int, hosts: int, batch: int) -> range:
    """Rows of a host if hosts divide a global batch in order."""
    return range(host * batch // hosts, (host + 1) * batch // hosts)


def recipe(**changes) -> Recipe:
    """A small recipe with one short prompt and tiny frames."""
    given = dict(config=TINY, words=Words(byte_tokenizer().to_str()), reading=READING, prompts=("What?", "Tell all."))
    given |= dict(caption_tokens=64, aligned=(1, 1))
    return Recipe(**(given | changes))


def write_clip(
    path: Path, seconds: float = 1.0, size: tuple[int, int] = (56, 84), sound: bool = True, seed: int = 0, fps: int = 10
) -> Path:
    """Write a small mp4 of moving noise and a tone. A .mov file gets PCM sound, which is fast to encode."""
    form, codec = ("mov", "pcm_f32le") if path.suffix == ".mov" else ("mp4", "aac")
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    still = rng.integers(0, 255, (*size, 3), np.uint8)
    with av.open(str(path), "w", format=form) as container:
        picture = container.add_stream("libx264", rate=fps, options={"preset": "ultrafast", "threads": "1"})
        picture.height, picture.width, picture.pix_fmt = *size, "yuv420p"
        tone = container.add_stream(codec, rate=16_000, layout="mono") if sound else None
        for number in range(max(1, round(seconds * fps))):
            frame = av.VideoFrame.from_ndarray(np.roll(still, 3 * number, axis=1), format="rgb24")
            container.mux(picture.encode(frame))
        container.mux(picture.encode(None))
        if tone:
            wave = 0.3 * np.sin(np.arange(round(seconds * 16_000)) * (0.1 + 0.02 * seed)).astype(np.float32)
            for first in range(0, len(wave), 16_000):
                block = av.AudioFrame.from_ndarray(
                    wave[None, first : first + 16_000].copy(), format="fltp", layout="mono"
                )
                block.sample_rate, block.pts = 16_000, first
                container.mux(tone.encode(block))
            container.mux(tone.encode(None))
    return path


def write_manifest(folder: Path, clips: int, name: str = "clips.jsonl") -> Path:
    """Write a manifest of small clips of several sizes and lengths, every third without sound."""
    lines = []
    for number in range(clips):
        video = f"clips/{number:03d}.mp4"
        size = ((56, 84), (84, 56), (56, 56))[number % 3]
        write_clip(folder / video, 0.6 + 0.4 * (number % 4), size, sound=number % 3 != 2, seed=number)
        caption = f"Clip {number}: " + "a tone is heard. " * (1 + number % 3)
        lines.append(
            {"id": f"clip-{number}", "video": video, "caption": caption, "references": [f"Another of {number}."]}
        )
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


class Spy:
    """A source whose records state the process that read them. Some records are bad, some are slow.

    Attributes:
        bad: record -> reason.
        slow: record -> seconds.
    """

    def __init__(self, source, bad=(), slow=()):
        self.source, self.index, self.bad, self.slow = source, source.index, dict(bad), dict(slow)

    def __getitem__(self, number):
        time.sleep(self.slow.get(number, 0))
        if number in self.bad:
            raise InputError(self.bad[number])
        record = self.source[number]
        bridge = sys.modules.get("jax._src.xla_bridge")
        observed = {"process": os.getpid(), "blas": os.environ.get("OPENBLAS_NUM_THREADS")}
        return record._replace(
            fields=record.fields | observed | {"device": bool(bridge and bridge.backends_are_initialized())}
        )

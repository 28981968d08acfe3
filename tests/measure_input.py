"""Rows per second of one core, for this package and for the reference's utilities and processors, on the same clips.

  python tests/measure_input.py CLIP...

Each path is run four times on each clip and its least processor time taken. The reference is handed the decoded
sound (it needs an ffmpeg binary to read an mp4's), and its video and sound processors run one after the other.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
import torchvision_ops  # noqa: F401 (must come before the reference's processors)
from qwen_omni_utils import process_vision_info
from transformers import Qwen2VLVideoProcessor, WhisperFeatureExtractor

from avocado_jax.data.decode import read_media
from avocado_jax.data.media import Reading
from avocado_jax.data.prompt import Prompt
from avocado_jax.data.records import Record, decoded, pack, unpack
from avocado_jax.data.rows import make_row, rounded, shape_of, stack
from avocado_jax.models.config import SEVEN_B

PROMPT = Prompt([0] * 60, [0] * 60)


def ours(packed: bytes) -> None:
    """Convert a record to a padded row."""
    clip = make_row(decoded(unpack(packed), Reading()), PROMPT, SEVEN_B).clip
    stack([clip], rounded(shape_of(clip)))


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", nargs="+", type=Path, metavar="CLIP")
    clips = parser.parse_args().clips
    torch.set_num_threads(1)
    size = {"shortest_edge": 128 * 28 * 28, "longest_edge": 768 * 28 * 28}
    video = Qwen2VLVideoProcessor(size=size)
    sound = WhisperFeatureExtractor(feature_size=128, sampling_rate=16_000, hop_length=160, chunk_length=300, n_fft=400)

    def reference(path: Path, samples: object) -> None:
        ask = {"type": "video", "video": str(path), "max_pixels": 401_408, "total_pixels": 20_070_400}
        _, (frames,) = process_vision_info([{"role": "user", "content": [ask]}])
        sound([samples], sampling_rate=16_000, padding="max_length", return_attention_mask=True, return_tensors="pt")
        video(videos=[frames], do_resize=False, do_sample_frames=False, return_tensors="pt")

    seconds: dict[str, float] = {}
    for path in clips:
        media = read_media(path)
        fields = {"id": path.name, "caption": ""}
        raw, ready = (pack(Record(fields, clip, path.name)) for clip in (path.read_bytes(), media))
        paths = {
            "reference": lambda path=path, media=media: reference(path, media.samples),
            "raw records": lambda raw=raw: ours(raw),
            "decoded records": lambda ready=ready: ours(ready),
        }
        for name, run in paths.items():
            least = float("inf")
            for _ in range(4):
                begun = time.process_time()
                run()
                least = min(least, time.process_time() - begun)
            seconds[name] = seconds.get(name, 0.0) + least
    for name, total in seconds.items():
        print(f"{name}: {len(clips) / total:.2f} rows a second, {seconds['reference'] / total:.2f} x the reference")
    return 0


if __name__ == "__main__":
    sys.exit(main())

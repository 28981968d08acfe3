"""Recall of a long clip's caption with and without segments, by the shipped captioner (run by hand).

  python tests/measure_segments.py --seconds 360

Joins AVWorld clips, each a scene, to one video, and captions it. Prints how far borders are from scene changes, and
what the captions get right.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from avocado_jax.world.check import measure
from avocado_jax.world.clip import record, write_mp4
from avocado_jax.world.director import make_script
from avocado_jax.world.render import render
from avocado_jax.world.script import LEVELS
from avocado_jax.world.sound import mix

AVOCADO = [sys.executable, "-m", "avocado_jax"]


def long_video(path: Path, seconds: float, level: int) -> tuple[dict, list[float]]:
    """Write a video of joined clips. Returns its truth, and the times at which its clips begin."""
    truth: dict = {"id": "long", "events": [], "dialogues": []}
    scripts, starts, time = [], [], 0.0
    while time < seconds:
        script = make_script(5, len(scripts), "test", level)
        one = record(script, references=0)
        for kind in ("events", "dialogues"):
            truth[kind] += [
                {**entry, "start": entry["start"] + time, "end": entry["end"] + time} for entry in one[kind]
            ]
        scripts.append(script)
        starts.append(time)
        time += script.duration
    pictures = (picture for script in scripts for picture in render(script))
    write_mp4(path, pictures, LEVELS[level].size, LEVELS[level].fps, np.concatenate([mix(one) for one in scripts]))
    return truth, starts


def caption(path: Path, *options: str) -> dict:
    """The caption of `avocado caption` for a video."""
    done = subprocess.run([*AVOCADO, "caption", str(path), "--json", *options], stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=360.0)
    parser.add_argument("--level", type=int, default=0)
    parser.add_argument("--segments", default="auto")
    parser.add_argument("--max-new-tokens", default="512")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "long.mp4")
        truth, starts = long_video(path, args.seconds, args.level)
        print(f"{len(starts)} clips, {len(truth['events'])} events", flush=True)
        for options in (["--segments", args.segments], []):
            made = caption(path, *options, "--max-new-tokens", args.max_new_tokens)
            scores = measure(made["caption"], truth)._asdict()
            print(options, {name: round(value, 3) for name, value in scores.items()}, made["truncated"])
            if options:
                borders = [segment["start"] for segment in made["segments"][1:]]
                far = [min(abs(border - start) for start in starts) for border in borders]
                lengths = [segment["end"] - segment["start"] for segment in made["segments"]]
                print(f"{len(lengths)} segments of {min(lengths):.1f} to {max(lengths):.1f} s")
                print(f"borders at most {max(far, default=0):.2f} s from a scene change", flush=True)


if __name__ == "__main__":
    main()

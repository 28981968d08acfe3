"""AVWorld: audiovisual clips whose every event, speaker, word and time is known.

    world OUT --clips 200 --seed 0 --level 0

writes OUT/clips/*.mp4 (one h264 and one AAC stream each) and OUT/clips.jsonl, a manifest line a clip with
events, dialogues, keypoints, probes and reference captions. The same seed gives the same clips. Existing clips
are not made again, so the same command resumes a stopped run.

    world --check FILE --truth OUT/clips.jsonl

reads lines {"id", "caption"}, or those that `caption --out FILE` has written, and prints {"id", "recall",
"hallucination", "order", "dialogue_f1"} for each, in order, computed exactly without a judge.
"""

import argparse
import json
import multiprocessing
import os
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from avocado_jax.data.reader import available_cores
from avocado_jax.errors import InputError
from avocado_jax.jsonl import read_captions
from avocado_jax.progress import progress
from avocado_jax.world.check import measure
from avocado_jax.world.clip import record, write_clip
from avocado_jax.world.director import make_script
from avocado_jax.world.script import LEVELS, SPLITS
from avocado_jax.world.truth import read_truth

STOPPED = 75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("out", metavar="OUT", nargs="?", type=Path, help="folder to write")
    parser.add_argument("--clips", type=int, metavar="N", help="number of clips")
    parser.add_argument("--seed", type=int, default=0, help="seed of the world (default: 0)")
    parser.add_argument(
        "--level",
        type=int,
        default=1,
        choices=range(len(LEVELS)),
        help="difficulty: length, events, vocabulary, voices, resolution (default: 1; the shipped captioner knows 0)",
    )
    parser.add_argument(
        "--split", default="train", choices=SPLITS, help="`test` has combinations that `train` does not have"
    )
    parser.add_argument(
        "--references", type=int, default=1, metavar="R", help="captions per clip (default: 1; 0: one plain caption)"
    )
    parser.add_argument(
        "--timestamps", action="store_true", help='one caption per clip, with "[start - end]" before each sentence'
    )
    parser.add_argument("--workers", type=int, metavar="W", help="processes (default: all cores)")
    parser.add_argument("--check", type=Path, metavar="FILE", help="captions to check: JSON lines")
    parser.add_argument("--truth", type=Path, metavar="CLIPS", help="the clips.jsonl with their truth")


def run(args: argparse.Namespace) -> int:
    if args.check or args.truth:
        if not (args.check and args.truth) or args.out or args.clips is not None:
            raise InputError("--check FILE and --truth CLIPS go together, without OUT and --clips")
        return check(args.check, args.truth)
    if not args.out or args.clips is None:
        raise InputError("OUT and --clips are required: world OUT --clips N")
    workers = available_cores() if args.workers is None else args.workers
    options = (("--clips", args.clips, 1), ("--references", args.references, 0), ("--workers", workers, 1))
    for name, value, least in options:
        if value < least:
            raise InputError(f"{name} must be at least {least}, not {value}")
    return make(args, workers)


def make(args: argparse.Namespace, workers: int) -> int:
    """Write the missing clips, then the manifest. Returns the exit status."""
    try:
        (args.out / "clips").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make {args.out / 'clips'}: {error.strerror}") from None
    settings = (args.out, args.seed, args.split, args.level, args.references, args.timestamps)
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(STOPPED))
    # Spawn the workers, so that the speech library and the encoders start from the same state in each.
    pool = ProcessPoolExecutor(min(workers, args.clips), multiprocessing.get_context("spawn"))
    try:
        jobs = [pool.submit(_make, index, *settings) for index in range(args.clips)]
        lines = list(progress((job.result() for job in jobs), "clips", total=args.clips))
        part = args.out / "clips.jsonl.part"
        part.write_text("".join(lines), encoding="utf-8")
        os.replace(part, args.out / "clips.jsonl")
        print(f"{args.clips} clips: {args.out / 'clips.jsonl'}", file=sys.stderr)
    except OSError as error:
        print(f"avocado world: {error}", file=sys.stderr)
        return 1
    finally:
        pool.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, previous)
    return 0


def _make(index: int, out: Path, seed: int, split: str, level: int, references: int, timestamps: bool) -> str:
    """Write one clip in a worker, unless it exists. Returns its manifest line."""
    script = make_script(seed, index, split, level)
    made = record(script, references, timestamps)
    if not (out / made["video"]).exists():
        write_clip(script, out / made["video"])
    return json.dumps(made, ensure_ascii=False) + "\n"


def check(captions: Path, truth: Path) -> int:
    """Print the metrics of each caption."""
    records = read_truth(truth)
    for where, line in read_captions(captions):
        name = next((name for name in (line["id"], Path(line["id"]).stem) if name in records), None)  # an id or file
        if name is None:
            raise InputError(f"{where}: {truth} has no clip {json.dumps(line['id'])}")
        scores = measure(line["caption"], records[name])
        print(json.dumps({"id": name, **scores._asdict()}, ensure_ascii=False))
    return 0

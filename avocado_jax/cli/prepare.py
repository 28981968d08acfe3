"""Turn a manifest of videos into shards to train from.

    avocado prepare clips.jsonl gs://bucket/clips
    avocado prepare clips.jsonl prepared --features --tokenizer checkpoint

MANIFEST has a JSON object a line: {"id", "video", "caption", ...} or ms-swift's {"messages", "videos"}; video paths
are relative to it, or gs://. OUT gets shard-*.array_record, index.jsonl, rejects.jsonl (what was left out, and why)
and, when all is done, manifest.json. A run that was stopped goes on where it was, and ends with the same bytes.
"""

import argparse
import json
import os
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields
from types import FrameType
from typing import NoReturn

from avocado_jax.checkpoint.references import tokenizer_folder
from avocado_jax.data.media import Reading, parse_reading
from avocado_jax.data.prepare import Job, prepare
from avocado_jax.data.storage import StorageError
from avocado_jax.data.words import load_words

STOPPED = 75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options."""
    cores = len(os.sched_getaffinity(0))
    parser.add_argument("manifest", metavar="MANIFEST", help="JSONL file, local or gs://")
    parser.add_argument("out", metavar="OUT", help="folder, local or gs://")
    parser.add_argument("--features", action="store_true", help="store resized frames and sound, not the video files")
    parser.add_argument("--tokenizer", metavar="REF", help="count captions in tokens (else in bytes)")
    names = ", ".join(field.name for field in fields(Reading) if field.name != "align_sound")
    parser.add_argument(
        "--reading",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help=f"how clips are sampled, where it is not AVoCaDO's way; the run must ask for the same ({names})",
    )
    parser.add_argument(
        "--align-sound",
        action="store_true",
        help="place late sound and sound behind gaps at its time (default: as the reference, without gaps)",
    )
    parser.add_argument("--workers", metavar="N", type=_count, default=cores, help=f"processes ({cores})")
    parser.add_argument("--shard-records", metavar="N", type=_count, default=64, help="lines to a shard (64)")
    parser.add_argument("--clip-seconds", metavar="S", type=float, default=300.0, help="to read one clip (300)")
    parser.add_argument(
        "--max-reject-share", metavar="X", type=float, default=0.05, help="of lines, past which it fails (0.05)"
    )
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Prepare. Returns 0, 1 where too much was rejected or storage failed, or 75 where it was stopped."""
    before = signal.signal(signal.SIGTERM, _stop)
    words = load_words(tokenizer_folder(args.tokenizer)) if args.tokenizer else None
    reading = Reading(**parse_reading(args.reading), align_sound=args.align_sound)
    job = Job(args.manifest, args.out, args.features, words, args.shard_records, args.clip_seconds, reading)
    try:
        done = prepare(job, args.workers, args.max_reject_share)
    except (StorageError, BrokenProcessPool) as error:
        print(f"avocado prepare: {error}; what is done is kept, run it again to go on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("avocado prepare: stopped; run it again to go on", file=sys.stderr)
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    for warning in done.warnings[:5]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(done.warnings) > 5:
        print(f"... and {len(done.warnings) - 5} more warnings", file=sys.stderr)
    for reject in done.rejects[:5]:
        print(f"rejected line {reject.line} ({reject.id}): {reject.reason}", file=sys.stderr)
    if len(done.rejects) > 5:
        print(f"... and {len(done.rejects) - 5} more: see rejects.jsonl", file=sys.stderr)
    counts = {"records": done.records, "rejected": len(done.rejects), "shards": done.shards, "bytes": done.bytes}
    if not done.complete:
        lines = done.records + len(done.rejects)
        print(
            f"avocado prepare: {len(done.rejects)} of {lines} lines rejected, more than {args.max_reject_share:g}",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(counts | {"complete": done.complete}))
    elif done.complete:
        print(f"{done.records} clips in {done.shards} shards ({done.bytes / 1e6:.1f} MB), {len(done.rejects)} rejected")
    return 0 if done.complete else 1


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value

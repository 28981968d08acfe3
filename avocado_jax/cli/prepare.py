"""Convert videos and their captions to training shards.

    avocado prepare clips.jsonl gs://bucket/clips
    avocado prepare clips.jsonl prepared --features --checkpoint Qwen/Qwen2.5-Omni-7B
    avocado prepare AVoCaDO_training_set.jsonl gs://bucket/shards --media 'parts/videos.part-*.tar.gz'
    avocado prepare hub:AVoCaDO-Captioner/training_set gs://bucket/shards

SOURCE is a JSONL file with an object a line, {"id": "a", "video": "a.mp4", "caption": "A man ..."} and optional fields
(avocado_jax/data/README.md, which also converts a CSV), or ms-swift's {"messages", "videos"};
Parquet files with these columns, where `video` is a path or has the bytes; or WebDataset tar files (a clip and a .json
or .txt file of one key). It is a path, a glob or a folder (ending in /), local or gs://, or hub:ORG/NAME[@REVISION].

Paths of videos are relative to SOURCE or to the folder --media, or are gs://. With --media PARTS.tar.gz, or tar files
beside the JSONL on the hub, clips are read from the tar files as streams: each is read once, and only the clips of
(workers + 1) shards are in TMPDIR at a time.

OUT gets shard-*.array_record, the index, rejects.jsonl (what was left out, and why), unused.jsonl (clips without a row,
with --media or parts) and, when all is done, manifest.json. Run the same command again to resume; to add rows that were
added to SOURCE, or rejected rows that were corrected; and to retry rejects whose cause may have passed. New records go
to new shards behind the others.

On several machines, run with --shard I/N on each, and then once with --finish.
"""

import argparse
import errno
import json
import os
import signal
import sys
from concurrent.futures.process import BrokenProcessPool
from dataclasses import fields, replace
from types import FrameType
from typing import NoReturn

from avocado_jax.checkpoint.references import tokenizer_folder
from avocado_jax.data.make_shard import Job
from avocado_jax.data.media import Reading, load_reading, parse_reading
from avocado_jax.data.prepare import prepare
from avocado_jax.data.prompt import read_prompts
from avocado_jax.data.reader import available_cores
from avocado_jax.data.shard import parse_shard
from avocado_jax.data.storage import StorageError, join
from avocado_jax.data.words import load_words

STOPPED = 75


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    cores = available_cores()
    parser.add_argument("source", metavar="SOURCE", help="manifest, WebDataset or Parquet: a path, gs:// or hub:")
    parser.add_argument("out", metavar="OUT", help="folder, local or gs://")
    parser.add_argument(
        "--media",
        metavar="PATH",
        help="folder or tar files of the clips (path or glob), local, gs:// or hub:",
    )
    parser.add_argument("--features", action="store_true", help="store resized frames and sound, not the video files")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="prompts, one per line, for rows without their own; the id of a row decides which one it gets",
    )
    parser.add_argument(
        "--checkpoint",
        metavar="REF",
        help="the model to train, which decides how clips are sampled and how captions are tokenized",
    )
    parser.add_argument("--tokenizer", metavar="REF", help="count captions in tokens of another model")
    names = ", ".join(field.name for field in fields(Reading) if field.name != "align_sound")
    parser.add_argument(
        "--reading",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help=f"override a property of clip sampling of --checkpoint or AVoCaDO ({names})",
    )
    parser.add_argument(
        "--align-sound",
        action="store_true",
        help="place late sound and sound behind gaps at its time (default: as the reference, without gaps)",
    )
    parser.add_argument("--workers", metavar="N", type=_count, default=cores, help=f"processes ({cores})")
    parser.add_argument("--shard-records", metavar="N", type=_count, default=64, help="clips per shard (64)")
    parser.add_argument(
        "--clip-seconds", metavar="S", type=float, default=300.0, help="time limit for reading a clip (300)"
    )
    parser.add_argument(
        "--max-reject-share", metavar="X", type=float, default=0.05, help="maximum share of rejected lines (0.05)"
    )
    machines = parser.add_mutually_exclusive_group()
    machines.add_argument(
        "--shard", metavar="I/N", help="do the work of machine I of N, from 0: by lines, or by tar files"
    )
    machines.add_argument("--finish", action="store_true", help="complete the output of machines with --shard")
    parser.add_argument("--json", action="store_true", help="print the result as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Prepare. Returns 0, 1 if storage failed, 3 if too many lines were rejected, or 75 after a signal."""
    before = signal.signal(signal.SIGTERM, _stop)
    model = tokenizer_folder(args.checkpoint) if args.checkpoint else None
    counted = tokenizer_folder(args.tokenizer) if args.tokenizer else model
    words = load_words(counted) if counted else None
    reading = load_reading(model) if model else Reading()
    reading = replace(reading, **parse_reading(args.reading), align_sound=reading.align_sound or args.align_sound)
    shard = parse_shard(args.shard) if args.shard else None
    prompts = read_prompts(args.prompt_file) if args.prompt_file else ()
    limits = args.shard_records, args.clip_seconds
    job = Job(args.source, args.out, args.features, words, *limits, reading, args.media, prompts)
    try:
        done = prepare(job, args.workers, args.max_reject_share, shard, args.finish)
    except (StorageError, BrokenProcessPool) as error:
        print(f"avocado prepare: {error}; finished work is kept; the same command resumes", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("avocado prepare: stopped; the same command resumes", file=sys.stderr)
        return STOPPED
    finally:
        signal.signal(signal.SIGTERM, before)
    if done is None:
        print(f"machine {shard[0]} of {shard[1]} has finished; when all have, run --finish", file=sys.stderr)
        return 0
    for warning in done.warnings[:5]:
        print(f"warning: {warning}", file=sys.stderr)
    if len(done.warnings) > 5:
        print(f"... and {len(done.warnings) - 5} more warnings", file=sys.stderr)
    for reject in done.rejects[:5]:
        video = f"{reject.video}: " if reject.video else ""
        print(f"rejected line {reject.line} ({reject.id}): {video}{reject.reason}", file=sys.stderr)
    if len(done.rejects) > 5:
        print(f"... and {len(done.rejects) - 5} more: see rejects.jsonl", file=sys.stderr)
    if any(reject.reason == os.strerror(errno.ENOENT) for reject in done.rejects):
        base = args.media or os.path.dirname(args.source) or "the current folder"
        print(f"paths of videos are relative to {base}: --media names another folder", file=sys.stderr)
    counts = {"records": done.records, "rejected": len(done.rejects), "shards": done.shards, "bytes": done.bytes}
    counts |= {"unused": done.unused}
    if not done.complete:
        lines = done.records + len(done.rejects)
        print(
            f"avocado prepare: {len(done.rejects)} of {lines} lines rejected, more than --max-reject-share "
            f"{args.max_reject_share:g}: {args.out} is not complete. Correct what {join(args.out, 'rejects.jsonl')} "
            "lists and run the same command again, which keeps the other clips; or set a larger share",
            file=sys.stderr,
        )
    if args.json:
        print(json.dumps(counts | {"complete": done.complete}))
    elif done.complete:
        print(f"{done.records} clips in {done.shards} shards ({done.bytes / 1e6:.1f} MB), {len(done.rejects)} rejected")
        if done.unused:
            print(f"clips without a row: {done.unused}, listed in unused.jsonl")
    return 0 if done.complete else 3  # a retry rejects the same lines


def _stop(signum: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value

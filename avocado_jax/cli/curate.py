"""Make a training manifest from raw videos, or references for existing captions, with a model behind an endpoint.

  avocado curate videos/ --out curated --url https://HOST/v1 --model M --dry-run
  avocado curate videos/ --out curated --url https://HOST/v1 --model M --budget-tokens 2000000
  avocado curate --from-captions captions.jsonl --out references --url https://HOST/v1 --model M
  avocado prepare curated/manifest.jsonl gs://bucket/shards

VIDEOS are files, or folders that are searched for videos. Each video passes through these stages, and is rejected at
the first that fails:

  read          the file can be decoded
  visual        the picture, scene by scene: subjects, setting, texts, camera (frames are sent as JPEG images)
  audio         the sound: speech with its tone, music, effects (sound is sent as WAV); skipped for silent clips
  fusion        both in one text in order of time; a program checks that every sentence of both is kept word for word,
                and nothing is added; the faults are sent to the model, which has two more tries
  length        tokens, --fewest-tokens to --most-tokens          repetition    no caption repeats itself
  completeness  1 to 5 by comparison with the captions before fusion, kept from 4
  keypoints     atomic facts in five dimensions, each once        dialogues     lines as the caption quotes them

With --from-captions, the captions are those of a manifest (the lines of `avocado prepare`, or ms-swift `messages`), and
only length, repetition and the stages of --references are run, for the lines that lack them: lines for SFT become lines
for GRPO. All other fields are kept. M needs text input only.

  keypoints, dialogues  as above      probes  questions with choices; their answers must be in the words of the caption

The endpoint speaks the OpenAI chat protocol, and M takes images and sound; with --checkpoint a local thinker writes
the captions of picture and sound, and M needs text input only. The key comes from the environment.

OUT gets manifest.jsonl, rejects.jsonl (stage and reason) and answers.jsonl, the raw answers as they come. Requests
whose answer is stored are not repeated: the same command resumes a stopped run. Budgets apply to the folder, over all
runs. Exit status: 0 done, 1 some clips had no answer (the same command retries them), 2 bad input, 3 the budget would
be exceeded (raise it and run the same command), 75 stopped.
"""

import argparse
import json
import math
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from avocado_jax.checkpoint.load import Checkpoint, identity, named_checkpoint
from avocado_jax.checkpoint.references import tokenizer_folder
from avocado_jax.curation.asking import Asker
from avocado_jax.curation.captions import MAKE, add_references, read_captions
from avocado_jax.curation.estimate import estimate_clips, estimate_references
from avocado_jax.curation.journal import Journal, open_journal
from avocado_jax.curation.local import local_captions
from avocado_jax.curation.pipeline import Captions, Settings
from avocado_jax.curation.run import curate, curate_clips, find_clips, write_outcome
from avocado_jax.data.media import Reading, load_reading
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import computing_dtype, load_captioner
from avocado_jax.remote.chat import ChatClient, Endpoint, request_fields

UNLIMITED = 10**9  # calls
SILENCE = 8  # minimum consecutive questions without an answer that stop a run; at least the concurrency


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    add = parser.add_argument
    add("videos", nargs="*", type=Path, metavar="VIDEO", help="files, or folders of them")
    add("--from-captions", type=Path, metavar="FILE", help="a manifest whose captions get references")
    add(
        "--references",
        default=",".join(MAKE),
        metavar="A,B",
        help="references that --from-captions makes (default: %(default)s)",
    )
    add("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--url", required=True, metavar="URL", help="base URL of an OpenAI-compatible API: https://HOST/v1")
    add("--model", required=True, metavar="M", help="name of the model at the endpoint")
    add(
        "--key",
        default="OPENAI_API_KEY",
        metavar="VARIABLE",
        help="environment variable of the API key (default: %(default)s)",
    )
    add("--checkpoint", metavar="REF", help="a thinker that captions picture and sound instead of M")
    add("--dtype", choices=("float32", "bfloat16"), help="dtype of --checkpoint (default: bfloat16, on a CPU float32)")
    add(
        "--fps",
        type=float,
        default=1.0,
        metavar="F",
        help="frames per second that are sent to M (default: %(default)g)",
    )
    add("--frames", type=int, default=64, metavar="N", help="maximum frames per clip (default: %(default)s)")
    add("--pixels", type=int, default=200_704, metavar="N", help="maximum pixels of a frame (default: %(default)s)")
    add("--tokenizer", metavar="REF", help="tokenizer for caption lengths (default: three bytes per token)")
    add("--fewest-tokens", type=int, default=16, metavar="N", help="minimum length of a caption (default: %(default)s)")
    add("--most-tokens", type=int, default=4096, metavar="N", help="maximum length of a caption (default: %(default)s)")
    add(
        "--answer-tokens",
        type=int,
        default=8192,
        metavar="N",
        help="maximum length of an answer (default: %(default)s)",
    )
    add("--request", default="{}", metavar="JSON", help="additional fields of every request; null removes one")
    add("--concurrency", type=int, default=16, metavar="N", help="concurrent clips and calls (default: %(default)s)")
    add("--per-minute", type=float, default=math.inf, metavar="N", help="requests per minute (default: no limit)")
    add("--timeout", type=float, default=180.0, metavar="S", help="time limit of a call (default: %(default)g)")
    add(
        "--patience",
        type=float,
        default=600.0,
        metavar="S",
        help="time limit of a request with its retries (default: %(default)g)",
    )
    add("--budget-calls", type=int, default=UNLIMITED, metavar="N", help="calls for this folder (default: no limit)")
    add("--budget-tokens", type=int, metavar="N", help="tokens for this folder (default: no limit)")
    add("--dry-run", action="store_true", help="print the number of calls and tokens without requests or output files")
    add("--json", action="store_true", help="print the result as a JSON object")


def run(args: argparse.Namespace) -> int:
    """Curate, write the files and print the counts. Returns the exit status."""
    check(args)
    wanted = args.references.split(",")
    captions, bad_lines = read_captions(args.from_captions) if args.from_captions else ([], [])
    clips = captions or find_clips(args.videos)
    checkpoint = named_checkpoint(args.checkpoint) if args.checkpoint else None
    tokenizer = load_words(tokenizer_folder(args.tokenizer)) if args.tokenizer else None
    settings = Settings(reading_of(args, checkpoint), args.fewest_tokens, args.most_tokens, tokenizer)
    options = request_fields(args.request, {"temperature": 0, "max_tokens": args.answer_tokens})
    if args.dry_run:
        if args.from_captions:
            print_counts(estimate_references(captions, settings, args.answer_tokens, wanted), args.json)
        else:
            print_counts(estimate_clips(clips, settings, args.answer_tokens, bool(checkpoint)), args.json)
        return 0
    with open_journal(args.out / "answers.jsonl") as journal, ChatClient(endpoint(args, journal, options)) as client:
        asker = Asker(client, journal, 60 / args.per_minute, max(SILENCE, args.concurrency))
        if args.from_captions:
            done = curate(asker, captions, partial(add_references, asker, settings, wanted), args.concurrency)
        else:
            done = curate_clips(asker, clips, settings, local(args, checkpoint, journal), args.concurrency)
    write_outcome(args.out, clips, done, bad_lines)
    left = len(clips) - len(done.lines) - len(done.rejects)
    if asker.why:
        print(f"avocado curate: stopped: {asker.why}; finished work is kept; the same command resumes", file=sys.stderr)
    counts = {"clips": len(clips), "kept": len(done.lines), "rejected": done.stages()}
    counts |= {"bad_lines": len(bad_lines)} if args.from_captions else {}
    print_counts(counts | {"unanswered": done.unanswered(), "left": left} | asker.spent(), args.json)
    if asker.exhausted:
        return 3
    return 1 if left or done.unanswered() else 0


def check(args: argparse.Namespace) -> None:
    """Validate the options. Raises InputError."""
    above = ("fps", "per_minute", "timeout", "patience")
    least = dict.fromkeys(("frames", "pixels", "most_tokens", "answer_tokens", "concurrency"), 1)
    for name in (*above, *least, "fewest_tokens", "budget_calls", "budget_tokens"):
        value = getattr(args, name)
        if value is not None and not (value > 0 if name in above else value >= least.get(name, 0)):
            bound = "more than 0" if name in above else f"at least {least.get(name, 0)}"
            raise InputError(f"--{name.replace('_', '-')} is {value}, must be {bound}")
    if bool(args.videos) == bool(args.from_captions):
        raise InputError("either videos or --from-captions FILE must be given")
    if args.from_captions and args.from_captions.resolve() == (args.out / "manifest.jsonl").resolve():
        raise InputError(f"{args.from_captions} would be overwritten; name another folder with --out")
    if unknown := [name for name in args.references.split(",") if name not in MAKE]:
        raise InputError(f"--references: {unknown[0]!r} is not one of {', '.join(MAKE)}")
    if args.from_captions and args.checkpoint:
        raise InputError("--checkpoint captions videos and excludes --from-captions")
    if args.out.exists() and not args.out.is_dir():
        raise InputError(f"--out {args.out} is not a folder")
    if args.dtype and not args.checkpoint:
        raise InputError("--dtype needs --checkpoint")


def reading_of(args: argparse.Namespace, checkpoint: Checkpoint | None) -> Reading:
    """How clips are sampled: the checkpoint's reading, or the command's options."""
    if checkpoint:
        return replace(load_reading(checkpoint.config_folder), align_sound=True)
    fewest = min(Reading.fewest_pixels, args.pixels)
    given = dict(fps=args.fps, most_frames=args.frames, asked_pixels=args.pixels, fewest_pixels=fewest)
    return Reading(**given, align_sound=True)


def endpoint(args: argparse.Namespace, journal: Journal, options: dict[str, Any]) -> Endpoint:
    """The endpoint with the remaining budget of the folder."""
    tokens = None if args.budget_tokens is None else max(0, args.budget_tokens - journal.before["tokens"])
    return Endpoint(
        args.url,
        args.model,
        args.key,
        concurrency=args.concurrency,
        timeout=args.timeout,
        patience=args.patience,
        tries=1,  # `Asker` retries with a description of the error
        blanks=3,
        max_calls=max(0, args.budget_calls - journal.before["calls"]),
        max_tokens=tokens,
        options=options,
        name="curator",
    )


def local(args: argparse.Namespace, checkpoint: Checkpoint | None, journal: Journal) -> Captions | None:
    """The captioner of picture and sound from the checkpoint; None without a checkpoint."""
    if checkpoint is None:
        return None
    dtype = computing_dtype(args.dtype)
    known = f"{identity(checkpoint)} {dtype}"
    return local_captions(lambda: load_captioner(checkpoint, None, dtype), known, args.most_tokens, journal)


def print_counts(counts: dict[str, Any], as_json: bool) -> None:
    """Print the counts."""
    if as_json:
        print(json.dumps(counts))
        return
    for name, value in counts.items():
        text = ", ".join(f"{part} {number}" for part, number in value.items()) if isinstance(value, dict) else value
        print(f"{name.replace('_', ' '):16} {text if text != '' else 0}")

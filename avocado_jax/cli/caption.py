"""Caption video clips from picture and sound.

  avocado caption clip.mp4                          # with the small captioner that ships: of AVWorld's level 0
  avocado caption clip.mp4 --checkpoint AVoCaDO-Captioner/AVoCaDO
  avocado caption clips/ 'more/*.mkv' gs://bucket/clips/ --checkpoint REF --out captions.jsonl
  avocado caption gs://bucket/clips/ --checkpoint REF --out gs://bucket/captions/ --shard auto

INPUT is a video file, a folder, a glob, an object, prefix or glob of a bucket (gs://), or a folder of prepared shards.
REF is a checkpoint in Hugging Face format or a run folder, local or gs://, or ORG/NAME[@REVISION] on the Hugging Face
hub. Without --out captions go to the terminal; with --json as one object a clip, in input order: clip, caption,
token_ids, prompt_ids, seconds, audio, truncated; or clip, error. Exit status: 1 if some clips failed, 2 if all did.

Captions degrade for clips of more than about 100 s. --segments auto splits clips of more than 100 s at scene changes
into segments of about 60 s (or "segment_seconds" of the checkpoint's reading.json; a scene of less than 100 s is not
split), and captions these: "caption" is their captions in order, "segments" lists start, end and caption of each.
--segments S splits clips of more than 5/3 S into segments of about S seconds, at most 5/3 S. Without it, a warning
states which frames or sound of a long clip are not used.

With --out, lines are appended to a file, or to captions-I-of-N.jsonl and rejects-I-of-N.jsonl in a folder or bucket.
Run the same command again after a stop: finished clips are not captioned again. Exit status 0 once every clip has a
caption or an error; 3 if too many clips in a row fail (--max-failed), as when credentials expire.

Compiled programs are kept in ~/.cache/avocado/compiled (below $XDG_CACHE_HOME if that is set), or in the folder that
JAX_COMPILATION_CACHE_DIR names.
"""

import argparse
import json
import os
import signal
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from typing import Any

import jax
import numpy as np

from avocado_jax.checkpoint.load import Checkpoint, identity, named_checkpoint
from avocado_jax.data.clips import ClipSource, list_clips
from avocado_jax.data.container import printable
from avocado_jax.data.media import Reading, load_reading
from avocado_jax.data.prompt import read_prompts
from avocado_jax.data.reader import CLIP_SECONDS, READERS, ClipReader
from avocado_jax.data.shard import parse_shard
from avocado_jax.data.storage import StorageError
from avocado_jax.errors import InputError, first_line
from avocado_jax.eval.captioner import computing_dtype, load_captioner, open_captioner
from avocado_jax.parallel.backend import use_gpu_memory
from avocado_jax.parallel.mesh import parse_mesh
from avocado_jax.parallel.signals import on_signal
from avocado_jax.progress import progress
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.engine import Engine, free_cache_bytes
from avocado_jax.sampling.logits import Sampling
from avocado_jax.sampling.outputs import CaptionFiles
from avocado_jax.sampling.segments import Segment, Segments, caption_fields, digest, group_by_clip, read_segments

LONGEST_CLIP = 100.0  # seconds; captions degrade for longer clips, which `--segments auto` splits
LONGEST_SEGMENT = 5 / 3  # maximum length of a segment, relative to the target
SHOWN = 20  # maximum number of failed clips printed individually with --out
GATHER = 1.0  # seconds that decoding on CPU waits for more clips, because the same cores read them
FLUSH_SECONDS = 20.0  # maximum time after a signal to append the last captions to a bucket
RECENT = 100  # number of recent clips for the share of failed ones


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("inputs", nargs="*", metavar="INPUT", help="video files, folders, globs, gs://, shards")
    parser.add_argument("--manifest", metavar="FILE", help='JSONL with "video" in each line, local or gs://')
    parser.add_argument("--checkpoint", metavar="REF", help="the model (see above; default: the one that is shipped)")
    parser.add_argument("--no-audio", action="store_true", help="ignore the sound")
    parser.add_argument(
        "--align-sound", action="store_true", help="place late sound at its time (default: as the reference, from 0)"
    )
    parser.add_argument(
        "--segments",
        metavar="auto|S",
        help="split long clips at scene changes into segments of about S s (auto: clips of more than 100 s)",
    )
    parser.add_argument(
        "--clip-seconds",
        type=float,
        default=CLIP_SECONDS,
        metavar="S",
        help="time limit for reading a clip or a segment, or for finding its scene changes (default: %(default)g)",
    )
    parser.add_argument("--prompt", metavar="TEXT", help="the question (default: the checkpoint's own, or AVoCaDO's)")
    parser.add_argument(
        "--prompt-file",
        metavar="FILE",
        help="prompts, one per line, for clips without their own; the name of a clip decides which one it gets",
    )
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s, all tokens")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default: %(default)s, all tokens")
    parser.add_argument("--seed", type=int, default=0, help="seed of sampling (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on accelerators, float32 on a CPU"
    )
    parser.add_argument(
        "--batch", type=int, metavar="N", help="clips that are decoded together (default: as many as fit in memory)"
    )
    parser.add_argument(
        "--mesh",
        metavar="DATA,TENSOR",
        help="DATA replicas of TENSOR devices each (default: as many replicas as fit on the local devices)",
    )
    parser.add_argument("--json", action="store_true", help="to the terminal: one JSON object a clip")
    parser.add_argument("--out", metavar="PATH", help="append to a file, a folder/ or a gs:// prefix, and resume there")
    parser.add_argument("--ids", action="store_true", help="with --out: token_ids and prompt_ids too")
    parser.add_argument("--retry-failed", action="store_true", help="with --out: caption clips with an error again")
    parser.add_argument(
        "--max-failed", type=float, default=0.5, metavar="SHARE", help=f"with --out: stop with exit status 3 once more "
        f"than this share of {RECENT} clips in a row failed (default: %(default)s; 1: never)"
    )  # fmt: skip
    parser.add_argument(
        "--shard", metavar="I/N", help="with --out: part I of N of the clips (I from 0), or 'auto' on a TPU slice, "
        "Kubernetes, SkyPilot and Slurm"
    )  # fmt: skip
    parser.add_argument(
        "--dry-run", action="store_true", help="print how many clips there are, how many are done, and an estimate"
    )


def run(args: argparse.Namespace) -> int:
    """Caption every clip. Clips that cannot be read get an error. Returns the exit status."""
    opened: list[CaptionFiles] = []
    restore = on_signal((signal.SIGINT, signal.SIGTERM), lambda number: _stop(number, opened))
    try:
        return _run(args, opened)
    finally:
        restore()


def _stop(number: int, opened: list[CaptionFiles]) -> None:
    """Exit immediately. Called in a thread, because the main thread may be in the compiler for minutes."""
    status = 130 if number == signal.SIGINT else 75
    print(f"avocado caption: stopped{'; the same command resumes' if opened else ''}", file=sys.stderr, flush=True)
    timer = threading.Timer(FLUSH_SECONDS, os._exit, (status,))
    timer.daemon = True
    timer.start()
    with suppress(StorageError):
        for files in opened:
            files.flush()
    os._exit(status)


def _run(args: argparse.Namespace, opened: list[CaptionFiles]) -> int:
    sampling, mesh = _check(args), parse_mesh(args.mesh)
    use_gpu_memory()
    prompts = read_prompts(args.prompt_file) if args.prompt_file else ()
    checkpoint, shard, dtype = named_checkpoint(args.checkpoint), parse_shard(args.shard), computing_dtype(args.dtype)
    reading = load_reading(checkpoint.config_folder)
    reading = replace(reading, align_sound=reading.align_sound or args.align_sound)
    # Sharded by name, so that an added file does not move other clips to other shards.
    clips = [
        clip for clip in list_clips(args.inputs, args.manifest, reading) if digest(clip.name) % shard[1] == shard[0]
    ]
    with ExitStack() as stack:
        files = None
        if args.out:
            options = _options(args, sampling, prompts, checkpoint, dtype)
            files = stack.enter_context(CaptionFiles(args.out, shard, options, args.retry_failed, args.dry_run))
            opened.append(files)
        left = [(number, clip) for number, clip in enumerate(clips) if not files or not files.take(clip.name)]
        if args.dry_run or (files and files.finished):
            done = f", {len(clips) - len(left)} of them are in {args.out}" if files else ""
            print(f"{len(clips)} clips{done}", file=sys.stderr)
        if args.dry_run or not left:
            if left:
                captioner = open_captioner(checkpoint, args.prompt, dtype)._replace(reading=reading)
                _print_estimate(args, captioner, left, mesh, prompts)
            return 0
        engine = None
        if any(clip.may_exist() for _, clip in left):  # otherwise do not load the model
            captioner = load_captioner(checkpoint, args.prompt, dtype, mesh)._replace(reading=reading)
            memory = free_cache_bytes(captioner.params)
            memory = files.keep("cache_bytes", memory) if files else memory
            batch = files.options["batch"] if files else args.batch
            report = _report if len(left) > 1 else lambda program: None
            gather = GATHER if jax.default_backend() == "cpu" else 0.0
            more = dict(report=report, gather=gather)
            engine = Engine(captioner, args.max_new_tokens, sampling, args.seed, batch, memory, **more)
        reader = stack.enter_context(ClipReader(READERS, args.clip_seconds))
        lengths = _segment_lengths(args.segments, reading)
        settings = Segments(reading, reader, not args.no_audio, prompts, lengths, _warn)
        requests = read_segments(left, engine and engine.captioner, settings)
        results = engine.run(requests) if engine else ((request, error) for request, error, _ in requests)
        return _write(_in_order(group_by_clip(results), [number for number, _ in left]), engine, args, files, len(left))


def _check(args: argparse.Namespace) -> Sampling:
    """Validate the options and return the sampling settings. Raises InputError."""
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise InputError(str(error)) from error
    if not args.inputs and not args.manifest:
        raise InputError("name clips to caption, or --manifest FILE")
    for name in ("max_new_tokens", "batch"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least 1")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {args.seed}; it must be 0 to {2**32 - 1}")
    if args.prompt is not None and args.prompt_file:
        raise InputError("--prompt and --prompt-file exclude each other")
    if not 0 <= args.max_failed <= 1:
        raise InputError(f"--max-failed is {args.max_failed:g}; it must be a share from 0 to 1")
    if not 0 < args.clip_seconds < float("inf"):
        raise InputError(f"--clip-seconds: {args.clip_seconds:g} is not a positive number of seconds")
    _segment_lengths(args.segments, Reading())
    for name in ("ids", "retry_failed", "shard"):
        if getattr(args, name) and not args.out:
            raise InputError(f"--{name.replace('_', '-')} needs --out")
    return sampling


def _segment_lengths(given: str | None, reading: Reading) -> tuple[float, float] | None:
    """The target and maximum length of segments in seconds."""
    if given is None:
        return None
    if given == "auto":
        return reading.segment_seconds, max(LONGEST_CLIP, LONGEST_SEGMENT * reading.segment_seconds)
    try:
        target = float(given)
    except ValueError:
        target = 0.0
    if not 1 <= target < float("inf"):
        raise InputError(f"--segments {given}: neither 'auto' nor a number of seconds from 1")
    return target, LONGEST_SEGMENT * target


def _warn(clip: ClipSource, warning: str) -> None:
    print(f"avocado caption: {printable(clip.name)}: warning: {warning}", file=sys.stderr)


def _print_estimate(
    args: argparse.Namespace,
    captioner: Captioner,
    clips: list[tuple[int, ClipSource]],
    mesh: tuple[int, int] | None,
    prompts: tuple[str, ...],
) -> None:
    from avocado_jax.planning.estimate import SAMPLED, estimate_clips, estimate_line  # imports training code

    count = min(SAMPLED, len(clips))
    sampled = [clips[number * len(clips) // count] for number in range(count)]
    with ClipReader(READERS, args.clip_seconds) as reader:
        settings = Segments(
            captioner.reading,
            reader,
            not args.no_audio,
            prompts,
            _segment_lengths(args.segments, captioner.reading),
            _warn,
        )
        rows = read_segments(sampled, captioner, settings)
        estimate = estimate_clips(captioner.config, rows, count, args.max_new_tokens, args.batch, mesh)
    line = estimate_line(estimate, len(clips)) if estimate else f"no estimate: none of {count} clips can be read"
    print(line, file=sys.stderr)


def _report(program: str) -> None:
    print(f"first {program}: it is compiled, or read from the cache", file=sys.stderr, flush=True)


def _options(
    args: argparse.Namespace, sampling: Sampling, prompts: tuple[str, ...], checkpoint: Checkpoint, dtype: str
) -> dict[str, Any]:
    """The settings that determine the captions. `batch` is None if it follows from the devices."""
    return {
        "checkpoint": identity(checkpoint)[:16],
        "prompt": args.prompt,
        "prompts": digest("\n".join(prompts)),
        "no_audio": args.no_audio,
        "align_sound": args.align_sound,
        "segments": args.segments,
        "max_new_tokens": args.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "seed": args.seed,
        "dtype": dtype,
        "batch": args.batch,
    }


def _in_order(results: Iterator[tuple[list[Segment], Any]], numbers: list[int]) -> Iterator[tuple[list[Segment], Any]]:
    """Yield results in the order of `numbers`."""
    early: dict[int, tuple[list[Segment], Any]] = {}
    order = iter(numbers)
    awaited = next(order)
    for segments, made in results:
        early[segments[0].number] = segments, made
        while awaited in early:
            yield early.pop(awaited)
            awaited = next(order, -1)


def _write(
    made: Iterator[tuple[list[Segment], Any]],
    engine: Engine | None,
    args: argparse.Namespace,
    files: CaptionFiles | None,
    total: int,
) -> int:
    """Write all results and print a summary. Returns the exit status."""
    reasons, captions, tokens, begun = Counter[str](), 0, 0, time.monotonic()
    recent, stopped = deque[bool](maxlen=RECENT), False
    for segments, result in progress(made, "clips", total) if total > 1 else made:
        name = segments[0].clip.name
        if isinstance(result, StorageError):  # may be temporary: not a failure of the clip
            raise result
        if isinstance(result, Exception):
            reason = str(result) if isinstance(result, InputError) else f"{printable(name)}: {first_line(result)}"
            record = {"clip": name, "error": reason}
            reasons[reason.removeprefix(f"{printable(name)}: ")] += 1
            if not files or reasons.total() <= SHOWN:
                print(f"avocado caption: {reason}", file=sys.stderr)
        else:
            captions, tokens = captions + 1, tokens + sum(map(len, result))
            record = _record(engine.captioner, segments, result, args.ids if files else args.json, bool(args.segments))
        if files:
            files.write(record)
        elif args.json:
            print(json.dumps(record), flush=True)
        elif "caption" in record:
            print(f"{printable(name)}:\n" * (total > 1) + record["caption"], flush=True)
        recent.append("error" in record)
        if stopped := bool(files) and sum(recent) > args.max_failed * RECENT:
            break
    failed = reasons.total()
    if files:
        chips = engine.mesh.size if engine and engine.mesh else 1
        print(_summary(captions, reasons, tokens, chips * (time.monotonic() - begun)), file=sys.stderr)
    if stopped:
        print(
            f"avocado caption: stopped: {sum(recent)} of the last {len(recent)} clips failed, more than --max-failed "
            f"{args.max_failed:g}; once the cause is removed, --retry-failed captions them",
            file=sys.stderr,
        )
        return 3
    return 0 if files or not failed else 2 if failed == total else 1


def _record(
    captioner: Captioner, segments: list[Segment], tokens: list[Any], ids: bool, in_segments: bool
) -> dict[str, Any]:
    """The output of a clip. Captions and ids of its segments are joined in order."""
    captions = [words(captioner, sequence) for sequence in tokens]
    with_ids = {"token_ids": np.concatenate(tokens).tolist()} if ids else {}
    with_ids |= {"prompt_ids": np.concatenate([segment.prompt_ids for segment in segments]).tolist()} if ids else {}
    return {
        "clip": segments[0].clip.name,
        "caption": "\n\n".join(caption for caption in captions if caption),
        **with_ids,
        **(caption_fields(segments, captions) if in_segments else segments[0].record),
        "truncated": any(int(sequence[-1]) not in captioner.stops for sequence in tokens),
    }


def _summary(captions: int, reasons: Mapping[str, int], tokens: int, chip_seconds: float) -> str:
    hours = max(chip_seconds, 1e-9) / 3600
    line = f"{captions} captions, {tokens} tokens, {captions / hours:.0f} clips per chip-hour"
    if reasons:
        most = sorted(reasons.items(), key=lambda item: -item[1])[:5]
        line += f"; {sum(reasons.values())} failed: " + "; ".join(f"{count} {reason}" for reason, count in most)
    return line

"""Describe video clips in words, picture and sound together.

  avocado caption clip.mp4                          # by the small captioner of AVWorld that comes with the package
  avocado caption clip.mp4 --checkpoint AVoCaDO-Captioner/AVoCaDO
  avocado caption a.mp4 b.mp4 --checkpoint REF --json --temperature 0.7 --seed 3

REF is a checkpoint in Hugging Face format (Qwen2.5-Omni, AVoCaDO: the full model or the thinker alone) or a run folder
(its newest finished step), local or gs://; or ORG/NAME[@REVISION] on the Hugging Face hub. With --json, one object a
clip in the order given: clip, caption, token_ids, prompt_ids, seconds, audio; for a clip that cannot be read: clip,
error. Exit status: 0, 1 if some clips failed, 2 if all did.
"""

import argparse
import json
import os
import sys
import zlib
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from avocado_jax.checkpoint.load import named_checkpoint
from avocado_jax.data.container import printable
from avocado_jax.data.media import Media
from avocado_jax.data.prompt import read_prompts
from avocado_jax.data.reader import CLIP_SECONDS, ClipReader
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import computing_dtype, load_captioner
from avocado_jax.eval.runner import FAILURES, first_line, read_ahead
from avocado_jax.progress import progress
from avocado_jax.sampling.captioner import Captioner, caption_rows, words
from avocado_jax.sampling.logits import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.add_argument("clips", nargs="+", metavar="CLIP", help="video files")
    parser.add_argument("--checkpoint", metavar="REF", help="the model (see above; default: the one that is shipped)")
    parser.add_argument("--no-audio", action="store_true", help="look without listening")
    parser.add_argument(
        "--align-sound", action="store_true", help="place late sound at its time (default: as the reference, from 0)"
    )
    parser.add_argument(
        "--clip-seconds", type=float, default=CLIP_SECONDS, metavar="S", help="to read one clip (default: %(default)g)"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="what to ask (default: the checkpoint's own, or AVoCaDO's)")
    parser.add_argument(
        "--prompt-file", metavar="FILE", help="prompts, one a line; the name of a clip decides which one it gets"
    )
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): the likeliest")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: %(default)s, all tokens")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="default: %(default)s, all tokens")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on accelerators, float32 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a clip")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there instead of to the terminal")


def run(args: argparse.Namespace) -> int:
    """Caption every clip; one that cannot be read is reported in its place."""
    try:
        sampling = Sampling(args.temperature, args.top_k, args.top_p)
    except ValueError as error:
        raise InputError(str(error)) from error
    if args.max_new_tokens < 1:
        raise InputError(f"--max-new-tokens is {args.max_new_tokens}, at least 1 is asked for")
    if not 0 <= args.seed < 2**32:
        raise InputError(f"--seed is {args.seed}, 0 to {2**32 - 1} are asked for")
    if args.prompt is not None and args.prompt_file:
        raise InputError("--prompt and --prompt-file exclude each other")
    if not args.clip_seconds > 0:
        raise InputError(f"--clip-seconds: {args.clip_seconds:g} is not a positive number of seconds")
    prompts = read_prompts(args.prompt_file) if args.prompt_file else ()
    checkpoint, stack = named_checkpoint(args.checkpoint), ExitStack()
    if not any(os.path.exists(clip) for clip in args.clips):  # before a model is loaded
        clips = [(clip, InputError(f"{printable(clip)}: no such file")) for clip in args.clips]
        captioner = None
    else:
        captioner = load_captioner(checkpoint, args.prompt, computing_dtype(args.dtype))
        reading = replace(captioner.reading, align_sound=captioner.reading.align_sound or args.align_sound)
        reader = stack.enter_context(ClipReader(seconds=args.clip_seconds))
        clips = read_ahead(args.clips, partial(reader.read, reading=reading, sound=not args.no_audio))
    try:
        out = args.out.open("w", encoding="utf-8") if args.out else nullcontext(sys.stdout)
    except OSError as error:
        raise InputError(f"--out {args.out}: {error.strerror}") from error
    failed = 0
    with stack, out as out:
        for clip, media in progress(clips, "clips", len(args.clips)) if len(args.clips) > 1 else clips:
            try:
                if isinstance(media, Exception):
                    raise media
                for warning in media.warnings:
                    print(f"avocado caption: {printable(clip)}: warning: {warning}", file=sys.stderr)
                record = _caption(captioner, clip, media, sampling, args, prompts)
            except FAILURES as error:  # the others are still captioned
                failed += 1
                reason = str(error) if isinstance(error, InputError) else f"{printable(clip)}: {first_line(error)}"
                record = {"clip": clip, "error": reason}
                print(f"avocado caption: {reason}", file=sys.stderr)
            if args.json:
                print(json.dumps(record), file=out, flush=True)
            elif "caption" in record:
                print(f"{printable(clip)}:\n" * (len(args.clips) > 1) + record["caption"], file=out, flush=True)
    return 0 if not failed else 2 if failed == len(args.clips) else 1


def _caption(
    captioner: Captioner,
    clip: str,
    media: Media,
    sampling: Sampling,
    args: argparse.Namespace,
    prompts: tuple[str, ...],
) -> dict[str, Any]:
    digest = zlib.crc32(os.fsencode(clip))
    row = captioner.row(media, {"prompt": prompts[digest % len(prompts)]} if prompts else {})
    number = np.array([digest >> 1])  # its draws do not depend on its place in the list
    samples = caption_rows(captioner, [row], number, sampling, args.max_new_tokens, args.seed)
    tokens = samples.tokens[0, 0, : samples.lengths[0, 0]]
    return {
        "clip": clip,
        "caption": words(captioner, tokens),
        "token_ids": tokens.tolist(),
        "prompt_ids": row.prompt_ids.tolist(),
        "seconds": round(media.seconds, 3),
        "audio": bool(len(row.clip.mel)),
    }

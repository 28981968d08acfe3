"""Measure what a checkpoint can do.

  avocado evaluate world --checkpoint DIR --data OUT/clips.jsonl --json

captions the clips of `avocado world OUT` (greedily, each clip's own question) and compares the captions with the
truth, with no judge. One JSON line: {"metrics": {...}, "n"}, means over n captions:

  event_recall    share of what is true that the caption says      hallucination  share of its claims that are not
  order           share of pairs told in the order they happen     dialogue_f1    lines and their speakers (R_D)
  repcol          share of captions that fall into repetition      length         tokens of a caption

Captions are kept in a file as they are made, with a digest of the checkpoint and the options; a run that was stopped
goes on with the same command. A clip that cannot be captioned is listed, on stderr and under "failed", and counts as
an empty caption; past the share --max-failed the run stops with exit status 1.

With --captions FILE, lines {"id", "caption"} that were made elsewhere are measured, and no model is needed. `length`
is then the mean of their "tokens" if they have it, else counted with the tokenizer of --checkpoint if it is named,
else null. A clip without a caption counts as one that failed.
"""

import argparse
import json
import sys
from pathlib import Path

from avocado_jax.checkpoint.load import identity, named_checkpoint
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import computing_dtype, load_captioner
from avocado_jax.eval.metrics import world_metrics
from avocado_jax.eval.runner import Caption, How, Item, Outcome, TooManyFailed, caption_items, digest, read_captions
from avocado_jax.world.truth import read_truth

BENCHMARKS = ("world",)
EMPTY = Caption("", 0)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    parser.add_argument("benchmark", choices=BENCHMARKS, metavar="BENCHMARK", help="world")
    parser.add_argument("--data", required=True, type=Path, metavar="FILE", help="clips.jsonl of `avocado world`")
    parser.add_argument("--checkpoint", metavar="DIR", help="the model (default: the one that is shipped)")
    parser.add_argument("--captions", type=Path, metavar="FILE", help="measure these instead of asking a model")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="where captions are kept (default: captions-*.jsonl beside the data)"
    )
    parser.add_argument("--no-audio", action="store_true", help="look without listening")
    parser.add_argument("--no-picture", action="store_true", help="listen without looking: every frame is grey")
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="default: %(default)s")
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="clips at once (default: %(default)s)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N clips only")
    parser.add_argument(
        "--max-failed", type=float, default=0.05, metavar="SHARE", help="of the clips (default: %(default)s)"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), help="default: bfloat16 on accelerators, float32 on a CPU"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Caption, measure, print. Returns the exit status."""
    for name in ("max_new_tokens", "batch", "limit"):
        if (value := getattr(args, name)) is not None and value < 1:
            raise InputError(f"--{name.replace('_', '-')} is {value}, at least 1 is asked for")
    if not 0 <= args.max_failed <= 1:
        raise InputError(f"--max-failed is {args.max_failed}, a share from 0 to 1 is asked for")
    if args.captions and args.out:
        raise InputError("--out is for captions that are made, --captions for such as there are")
    every = read_truth(args.data, None if args.captions else {"video": str})
    records = dict(list(every.items())[: args.limit])
    try:
        outcome = _given(args, every, list(records)) if args.captions else _made(args, records)
    except TooManyFailed as error:
        print(f"avocado evaluate: {error}", file=sys.stderr)
        return 1
    captions = [outcome.captions.get(name, EMPTY) for name in records]
    texts, lengths = zip(*captions)
    metrics = world_metrics(texts, lengths, list(records.values()))
    if outcome.failed:
        told = f"{len(outcome.failed)} of {len(records)} clips failed; their captions count as empty"
        print(f"avocado evaluate: {told}", file=sys.stderr)
    if args.json:
        failed = {"failed": list(outcome.failed)} if outcome.failed else {}
        print(json.dumps({"metrics": metrics, "n": len(records), **failed}))
    else:
        for name, value in metrics.items():
            print(f"{name:14} {'unknown' if value is None else f'{value:.3f}'}")
        print(f"{'n':14} {len(records)}")
    return 0


def _made(args: argparse.Namespace, records: dict[str, dict]) -> Outcome:
    """Captions of the checkpoint."""
    folder = args.data.parent
    for one in records.values():
        if not isinstance(one.get("prompt", ""), str):
            raise InputError(f'{args.data}: the "prompt" of {one["id"]} must be a string')
    items = [Item(one["id"], folder / one["video"], one.get("prompt") or None) for one in records.values()]
    if not any(item.video.exists() for item in items):
        raise InputError(f"{items[0].video}: no such file, nor any other video of {args.data}")
    checkpoint = named_checkpoint(args.checkpoint)
    how = How(args.max_new_tokens, computing_dtype(args.dtype), not args.no_audio, not args.no_picture)
    known = identity(checkpoint)
    file = args.out or folder / f"captions-{digest([known, vars(how)])[:8]}.jsonl"

    def load():
        return load_captioner(checkpoint, None, how.dtype)

    return caption_items(items, load, known, how, file, args.batch, args.max_failed)


def _given(args: argparse.Namespace, every: dict[str, dict], wanted: list[str]) -> Outcome:
    """Captions made elsewhere."""
    captions = read_captions(args.captions, every)
    tokenizer = load_words(named_checkpoint(args.checkpoint).side_files) if args.checkpoint else None
    if tokenizer:
        captions = {
            name: Caption(one.text, len(tokenizer.encode(one.text)) if one.tokens is None else one.tokens)
            for name, one in captions.items()
        }
    failed = {name: "no caption" for name in wanted if name not in captions}
    if len(failed) > args.max_failed * len(wanted):
        raise TooManyFailed(
            f"{args.captions}: no caption of {len(failed)} of {len(wanted)} clips, such as {next(iter(failed))}; "
            f"the share of {args.max_failed:g} is allowed (--max-failed)"
        )
    return Outcome(captions, failed)

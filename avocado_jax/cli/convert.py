"""Convert a checkpoint from Hugging Face format to a run folder (Orbax), or back.

  avocado convert from-hf AVoCaDO-Captioner/AVoCaDO gs://bucket/avocado
  avocado convert to-hf runs/grpo grpo-hf --step 500
  avocado convert to-hf runs/grpo grpo-hf --push ORG/NAME

Both directions stream: one tensor, one layer, in memory at a time. Tensors keep their dtype. Low-rank adapters are
merged in fp32 and then cast; stderr reports how much of their update the cast loses (`--dtype float32` keeps it).
Parts that are not modelled (talker, token2wav, spk_dict.pt, tokenizer and config files) are copied unchanged.
"""

import argparse
import logging
import sys
from pathlib import Path

import jax

from avocado_jax.checkpoint.convert import DTYPES, from_hf, push, to_hf
from avocado_jax.data.media import parse_reading
from avocado_jax.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="from-hf|to-hf")
    there = ways.add_parser("from-hf", help="a checkpoint in Hugging Face format to a run folder, at step 0")
    back = ways.add_parser("to-hf", help="a run folder to a checkpoint that transformers loads")
    there.add_argument("source", metavar="SRC", help="a folder, gs:// or ORG/NAME[@REVISION] on the hub")
    back.add_argument("source", metavar="SRC", help="local or gs://")
    for way in (there, back):
        way.add_argument("target", metavar="DST", help="local or gs://; must not exist")
    there.add_argument(
        "--reading",
        metavar="NAME=VALUE",
        action="append",
        default=[],
        help="how the checkpoint's clips are sampled and prompted, where it is not AVoCaDO's way: names as in "
        "`avocado prepare --help`, and prompt=TEXT, system=TEXT (empty: none), media_first=true/false",
    )
    back.add_argument("--step", type=int, metavar="N", help="default: the newest finished step")
    back.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")
    back.add_argument("--push", metavar="ORG/NAME", help="upload DST, a local folder, to the hub; may be repeated")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs tracebacks of errors that are printed here
    jax.config.update("jax_platforms", "cpu")  # no computation: do not occupy an accelerator
    if args.way == "from-hf":
        from_hf(args.source, args.target, parse_reading(args.reading, habits=True))
        print(args.target)
    else:
        if args.push and args.target.startswith("gs://"):
            raise InputError(f"--push: DST is {args.target}, not a local folder")
        step, rounding = to_hf(args.source, args.target, args.step, args.dtype, keep=bool(args.push))
        print(f"{args.target} (step {step})")
        if rounding is not None:
            print(f"adapters merged; rounding loses {rounding:.1%} of their update (relative norm)", file=sys.stderr)
        if args.push:
            print(push(Path(args.target), args.push))
    return 0

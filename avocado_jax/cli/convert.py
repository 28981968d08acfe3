"""Take a checkpoint from Hugging Face format to a run folder (Orbax), or back.

  avocado convert from-hf Qwen2.5-Omni-7B runs/base
  avocado convert to-hf runs/grpo grpo-hf --step 500

Both ways stream: one tensor, one layer, in memory at a time. Tensors keep their dtype. What is not modelled
(talker, token2wav, spk_dict.pt, tokenizer and config files) comes back as it was.
"""

import argparse
import logging
from pathlib import Path

import jax

from avocado_jax.checkpoint.convert import DTYPES, from_hf, to_hf


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command."""
    ways = parser.add_subparsers(dest="way", required=True, metavar="from-hf|to-hf")
    there = ways.add_parser("from-hf", help="a checkpoint in Hugging Face format to a run folder, at step 0")
    back = ways.add_parser("to-hf", help="a run folder to a checkpoint that transformers loads")
    there.add_argument("source", type=Path, metavar="SRC")
    back.add_argument("source", metavar="SRC", help="local or gs://")
    for way in (there, back):
        way.add_argument("target", type=Path, metavar="DST", help="must not exist")
    back.add_argument("--step", type=int, metavar="N", help="default: the newest finished step")
    back.add_argument("--dtype", choices=sorted(DTYPES), help="default: as stored")


def run(args: argparse.Namespace) -> int:
    """Convert."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax logs the traceback of what we tell in a line
    jax.config.update("jax_platforms", "cpu")  # nothing is computed: an accelerator in use is left alone
    if args.way == "from-hf":
        from_hf(args.source, args.target)
        print(args.target)
    else:
        step = to_hf(args.source, args.target, args.step, args.dtype)
        print(f"{args.target} (step {step})")
    return 0

"""Measure the hot paths with random weights, against the ceilings of this machine.

  avocado bench prefill --size 7b --clip-tokens 16178
  avocado bench decode --size 7b --group 8 --clip-tokens 16384 --caption-tokens 128
  avocado bench sft --size 3b --group 1 --clip-tokens 8192 --caption-tokens 768
  avocado bench grpo --size 3b --group 8 --clip-tokens 16384 --caption-tokens 640    # --train lora: adapters only
  avocado bench grpo --size 3b --rollout-batches 4 --rollout-int8   # captions of four batches sampled together, int8
  avocado bench caption --size 7b --slots 16 --caption-tokens 640 --mesh 4,2   # clips per second and their upper bound
  avocado bench rewards --captions 64 --caption-tokens 1000    # against 12 lines and 40 keypoints each

`tflops` and `bytes_per_second` count the work that the shapes imply; `ceiling_*` are a large matrix product and
a large copy, measured in the same run. Needs jax, flax, optax and numpy only; `input` also needs the packages of data/.

  avocado bench input --data SHARDS                 # a folder that `prepare` made: rows a second of one core
"""

import argparse
import json

import jax

from avocado_jax.bench.caption import bench_caption
from avocado_jax.bench.grpo import bench_grpo
from avocado_jax.bench.model import bench_decode, bench_prefill
from avocado_jax.bench.rewards import bench_rewards
from avocado_jax.bench.sft import bench_sft
from avocado_jax.errors import InputError
from avocado_jax.models.config import REMAT, SIZES
from avocado_jax.parallel.backend import use_exact_fp32, use_gpu_memory
from avocado_jax.parallel.mesh import parse_mesh


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.add_argument("what", choices=("prefill", "decode", "sft", "grpo", "rewards", "caption", "input"))
    parser.add_argument("--size", choices=tuple(SIZES), default="tiny", help="default: %(default)s")
    parser.add_argument("--group", type=int, default=8, metavar="G", help="captions of the clip (default: %(default)s)")
    parser.add_argument("--clip-tokens", type=int, default=16178, metavar="N", help="default: %(default)s, 30 s")
    parser.add_argument("--caption-tokens", type=int, default=128, metavar="C", help="default: %(default)s")
    parser.add_argument("--remat", choices=REMAT, default="full", help="for `sft`, `grpo` (default: %(default)s)")
    parser.add_argument("--train", choices=("captioner", "lora"), default="captioner", help="for `grpo`")
    parser.add_argument(
        "--rollout-batches",
        type=int,
        default=1,
        metavar="K",
        help="for `grpo`: batches that are sampled together, of a clip per device each (default: %(default)s)",
    )
    parser.add_argument("--rollout-int8", action="store_true", help="for `grpo`: sample with int8 kernels")
    parser.add_argument("--captions", type=int, default=64, metavar="N", help="for `rewards` (default: %(default)s)")
    parser.add_argument(
        "--slots",
        type=int,
        default=16,
        metavar="S",
        help="for `caption`: slots per data replica (default: %(default)s)",
    )
    parser.add_argument("--mesh", default="1,1", metavar="DATA,TENSOR", help="for `caption` (default: one device)")
    parser.add_argument("--data", metavar="SHARDS", help="for `input`: a folder of `prepare`")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="default: bfloat16, float32 on a CPU")
    parser.add_argument("--json", action="store_true", help="one JSON object")


def run(args: argparse.Namespace) -> int:
    """Measure one path and print the result."""
    use_gpu_memory()
    if min(args.group, args.caption_tokens, args.rollout_batches, args.slots) < 1 or args.clip_tokens < 1024:
        raise InputError(
            "--group, --caption-tokens, --rollout-batches and --slots must be at least 1, --clip-tokens at least 1024"
        )
    dtype = args.dtype or ("float32" if jax.default_backend() == "cpu" else "bfloat16")
    use_exact_fp32(dtype)
    if args.what == "input":
        from avocado_jax.bench.input import bench_input  # needs packages that the other paths do not need
        from avocado_jax.data.media import Reading

        if not args.data:
            raise InputError("input: --data is missing")
        result = bench_input(args.data, args.size, Reading())
    elif args.what == "rewards":
        if args.captions < args.group or args.caption_tokens < 100:
            raise InputError("rewards: --captions must be at least --group, --caption-tokens at least 100")
        result = bench_rewards(args.captions, args.group, args.caption_tokens)
    elif args.what == "sft":
        result = bench_sft(args.size, args.group, args.clip_tokens, args.caption_tokens, dtype, args.remat)
    elif args.what == "grpo":
        result = bench_grpo(
            args.size,
            args.group,
            args.clip_tokens,
            args.caption_tokens,
            dtype,
            args.remat,
            args.train,
            args.rollout_batches,
            args.rollout_int8,
        )
    elif args.what == "caption":
        result = bench_caption(
            args.size, args.slots, args.clip_tokens, args.caption_tokens, dtype, parse_mesh(args.mesh)
        )
    elif args.what == "prefill":
        result = bench_prefill(args.size, args.clip_tokens, dtype)
    else:
        result = bench_decode(args.size, args.group, args.clip_tokens, args.caption_tokens, dtype)
    if args.json:
        print(json.dumps(result))
    else:
        print("  ".join(f"{name} {_short(value)}" for name, value in result.items()))
    return 0


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)

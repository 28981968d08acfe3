"""Supervised fine-tuning of a captioner.

  avocado sft configs/world_tiny.py --workdir runs/world_tiny
  avocado sft configs/sft_7b.py --workdir gs://bucket/run --init CHECKPOINT --data.train gs://bucket/shards

The same command starts, resumes and finishes a run: killed at any moment, it continues from its newest checkpoint and
ends with bit-identical metrics. SIGTERM and Ctrl-C finish the step, save and exit with 75; before the first step of a
start they exit at once. `--a.b value` changes a field of the config; all fields are listed below.
With several processes, start each with the same command and its own `--process`; on a TPU pod `--coordinator auto`
is enough. A host that makes no progress for `--timeouts.step` seconds dumps all stacks, names the host that the others
wait for and exits with 75.

`--deterministic` makes training repeat to the bit on GPU, where the fastest kernels do not; CPU and TPU repeat without
it. It is slower: XLA selects kernels without timing them (no autotuning), and scatters run in a fixed order. Start and
resume a run with the same setting. `--debug-nans` ends the run with exit status 3 at the first NaN, and prints the
operation that returned it. It is slow, because every program waits for its results, and it takes more memory: buffers
are not donated, so that a program that returned NaN can run again, one operation at a time. Without it, steps whose
gradient is not finite are skipped and counted (`max_skipped`).

RUN/metrics.jsonl has a line a step; RUN/checkpoints is what `caption`, `evaluate` and `convert to-hf` read.
"""

import argparse
import json
import os
import sys

import jax

from avocado_jax.config import GrpoConfig, RunConfig, SftConfig, as_json, as_sft, load
from avocado_jax.errors import InputError
from avocado_jax.fields import field_help
from avocado_jax.parallel.backend import use_gpu_memory
from avocado_jax.parallel.processes import init_distributed

CONFIG_HELP = "a Python file that defines `config`, or the name of one in configs/, such as sft_7b"


def add_arguments(parser: argparse.ArgumentParser, fields: RunConfig = SftConfig()) -> None:  # noqa: B008
    """Declare the arguments; unknown ones are config fields."""
    parser.epilog = field_help(fields)
    parser.add_argument("config", metavar="CONFIG", help=CONFIG_HELP)
    parser.add_argument("--workdir", metavar="RUN", help="folder of the run, local or gs:// (required)")
    parser.add_argument(
        "--print-config", action="store_true", help="print the config with all fields as JSON, and exit"
    )
    parser.add_argument("--coordinator", metavar="HOST:PORT", help="address of process 0; auto: from the platform")
    parser.add_argument("--processes", type=int, metavar="N", help="number of processes")
    parser.add_argument("--process", type=int, metavar="I", help="index of this process, from 0")
    parser.add_argument("--devices", type=int, metavar="N", help="expected number of devices of all processes together")
    parser.add_argument("--deterministic", action="store_true", help="bit-identical results on GPU; slower (see above)")
    parser.add_argument(
        "--debug-nans", action="store_true", help="end at the first NaN and locate it; slow (see above)"
    )
    parser.set_defaults(fields=[])


def configure_jax(args: argparse.Namespace) -> None:
    """Configure jax for training. Call this before a backend is initialised: XLA reads its environment once."""
    use_gpu_memory()
    if args.deterministic:
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_deterministic_ops=true".lstrip()
    jax.config.update("jax_debug_nans", args.debug_nans)


def folder_of_run(args: argparse.Namespace, config: RunConfig) -> str:
    """The run folder; empty if --print-config has printed the config instead.

    Raises:
        InputError: neither option is given.
    """
    if args.print_config:
        print(json.dumps(as_json(config), indent=2))
        return ""
    if not args.workdir:
        raise InputError("--workdir RUN, the folder of the run, is required")
    return args.workdir


def run(args: argparse.Namespace) -> int:
    """Train."""
    config = load(args.config, args.fields)
    if isinstance(config, GrpoConfig):
        print(f"sft: {args.config} is of GRPO: fine-tuning on its clips, with its steps and optimizer", file=sys.stderr)
        config = as_sft(config)
    if not isinstance(config, SftConfig):
        raise InputError(f"{args.config}: a {type(config).__name__}; sft takes an SftConfig")
    if not folder_of_run(args, config):
        return 0
    configure_jax(args)
    with init_distributed(args.coordinator, args.processes, args.process, args.devices, config.timeouts):
        from avocado_jax.parallel.compiled import use_cache  # after init_distributed: these may touch devices
        from avocado_jax.train.run import sft

        use_cache(args.workdir)
        return sft(config, args.workdir)

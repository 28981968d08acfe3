"""Train a captioner on rewards of its own captions.

  avocado grpo configs/grpo_world.py --workdir runs/grpo_world
  avocado grpo configs/grpo_7b.py --workdir gs://bucket/run --init CHECKPOINT --data.train gs://bucket/shards

Each step samples a group of captions of every clip, rewards them and updates the policy. The same command starts,
resumes and finishes a run: killed at any moment, it continues from its newest checkpoint and ends with bit-identical
metrics. SIGTERM, Ctrl-C, several processes, timeouts, `--deterministic` and `--debug-nans` work as in `sft`; a reward
that is NaN, because a clip has no reference for it, does not end the run. `--a.b value` changes a field of the config;
all fields are listed below.

RUN/metrics.jsonl has a line a step, RUN/rollouts/STEP.jsonl a line a caption with its rewards and advantage;
RUN/checkpoints is what `caption`, `evaluate` and `convert to-hf` read.
"""

import argparse

from avocado_jax.cli import sft
from avocado_jax.cli.sft import configure_jax, folder_of_run
from avocado_jax.config import GrpoConfig, load
from avocado_jax.errors import InputError
from avocado_jax.parallel.processes import init_distributed


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments of `sft`, with the fields of a GRPO config."""
    sft.add_arguments(parser, GrpoConfig())


def run(args: argparse.Namespace) -> int:
    """Train."""
    config = load(args.config, args.fields)
    if not isinstance(config, GrpoConfig):
        raise InputError(f"{args.config}: its config is of type {type(config).__name__}; grpo takes a GrpoConfig")
    if not folder_of_run(args, config):
        return 0
    configure_jax(args)
    with init_distributed(args.coordinator, args.processes, args.process, args.devices, config.timeouts):
        from avocado_jax.parallel.compiled import use_cache  # after init_distributed: these may touch devices
        from avocado_jax.train.run_grpo import grpo

        use_cache(args.workdir)
        return grpo(config, args.workdir)

"""Train a captioner on rewards of its own captions.

  avocado grpo configs/grpo_world.py --workdir runs/grpo_world
  avocado grpo configs/grpo_7b.py --workdir gs://bucket/run --init CHECKPOINT --data.train gs://bucket/shards

Each step samples a group of captions of every clip, rewards them and updates the policy. The same command starts,
resumes and finishes a run: killed at any moment, it goes on from its newest checkpoint and ends with the same metrics
to the bit. SIGTERM ends the step, saves and exits 75. Any field of the config is changed as `--a.b value`;
avocado_jax/config.py says what each is. Several processes are started as those of `sft`.

RUN/metrics.jsonl has a line a step, RUN/rollouts/STEP.jsonl a line a caption with its rewards and advantage;
RUN/checkpoints is what `caption`, `evaluate` and `convert to-hf` read.
"""

import argparse

from avocado_jax.cli.sft import add_arguments
from avocado_jax.config import GrpoConfig, load
from avocado_jax.errors import InputError
from avocado_jax.parallel.processes import joined

__all__ = ["add_arguments", "run"]


def run(args: argparse.Namespace) -> int:
    """Train."""
    config = load(args.config, args.fields)
    if not isinstance(config, GrpoConfig):
        raise InputError(f"{args.config}: its config is of type {type(config).__name__}; grpo takes a GrpoConfig")
    with joined(args.coordinator, args.processes, args.process, args.devices):
        from avocado_jax.train.run_grpo import grpo  # after the processes have met: it may touch devices

        return grpo(config, args.workdir)

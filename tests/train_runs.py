"""Small runs of the commands sft and grpo in separate processes.

They write no TensorBoard files: tensorboardX imports torch, which the tests install, and that takes seconds.
"""

import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

from avocado_jax.models.config import SIZES, TINY

SCRIPT = Path(__file__).parents[1] / "launch" / "random_checkpoint.py"
ONE_LAYER = replace(
    TINY,
    audio=replace(TINY.audio, layers=1),
    vision=replace(TINY.vision, layers=1, full_layers=(0,)),
    text=replace(TINY.text, layers=1),
)
CONFIG = """
from avocado_jax.config import DataConfig, OptimConfig, SftConfig

config = SftConfig(
    init={init!r},
    steps=6,
    batch=8,
    dtype="float32",
    frozen_dtype="float32",
    remat="none",
    tensorboard=False,
    data=DataConfig(
        train="world:0:train:0:20:plain", heldout="world:0:test:0:8:plain", caption_tokens=48, shapes=1, threads=1
    ),
    optim=OptimConfig(lr=3e-3),
    checkpoint_every=2,
    eval_every=3,
    eval_rows=8,
    samples=1,
    sample_tokens=8,
)
"""

GRPO = """
from avocado_jax.config import DataConfig, GrpoConfig, OptimConfig, RewardConfig, SamplingConfig

config = GrpoConfig(
    init={init!r},
    steps=5,
    batch=4,
    group=4,
    passes=2,
    dtype="float32",
    frozen_dtype="float32",
    reference_dtype="float32",
    remat="none",
    tensorboard=False,
    data=DataConfig(
        train="world:0:train:0:20:plain", heldout="world:0:test:0:4:plain", caption_tokens=48, shapes=1, threads=1
    ),
    sampling=SamplingConfig(tokens=24),
    rewards=RewardConfig(low=8, high=24, keypoints=16, lines=4),
    optim=OptimConfig(lr=3e-3),
    checkpoint_every=2,
    eval_every=3,
    eval_rows=4,
)
"""


class Runs:
    """Starts runs of one config. `cache` is their compile cache, so that later starts are fast."""

    def __init__(self, folder: Path, init: Path, command: str = "sft", config: str = CONFIG):
        self.command = command
        self.folder, self.logs, self.cache = folder, folder, folder / "compiled"
        self.config = folder / "small.py"
        self.config.write_text(config.format(init=str(init)))

    def start(self, name, *fields, devices=2, processes=1, cached=True, last=()):
        """Start one process, or a list of several connected ones. Output goes to files.

        `last`: more fields, of the last process alone.
        """
        flags = f"--xla_force_host_platform_device_count={devices} --xla_backend_optimization_level=1"
        flags += " --xla_cpu_use_fusion_emitters=false"  # as in conftest.py
        env = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu", "JAX_LOG_COMPILES": "1"}
        if cached:
            env |= {"JAX_COMPILATION_CACHE_DIR": str(self.cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [
            sys.executable,
            "-m",
            "avocado_jax",
            self.command,
            str(self.config),
            "--workdir",
            f"{self.folder}/{name}",
        ]
        if processes > 1:
            with socket.socket() as reserved:
                reserved.bind(("127.0.0.1", 0))
                command += ["--coordinator", f"127.0.0.1:{reserved.getsockname()[1]}", "--processes", str(processes)]
        started = []
        for number in range(processes):
            which = ["--process", str(number)] if processes > 1 else []
            out = (self.logs / f"{name}-{number}.log").open("a")
            more = last if number == processes - 1 else ()
            started.append(subprocess.Popen([*command, *which, *fields, *more], env=env, stdout=out, stderr=out))
        return started if processes > 1 else started[0]

    def finish(self, name, *fields, expect=0, **options):
        """Run to the end. Returns its log."""
        process = self.start(name, *fields, **options)
        several = process if isinstance(process, list) else [process]
        statuses = [one.wait(timeout=400) for one in several]
        log = "".join((self.logs / f"{name}-{number}.log").read_text() for number in range(len(several)))
        assert statuses == [expect] * len(several), log[-3000:]
        return log

    def lines(self, name):
        """metrics.jsonl without what depends on the clock."""
        text = (self.folder / name / "metrics.jsonl").read_text()
        return [{key: value for key, value in json.loads(line).items() if key != "perf"} for line in text.splitlines()]

    def compilations(self, name):
        """`perf.compilations` of each step."""
        text = (self.folder / name / "metrics.jsonl").read_text()
        return [json.loads(line)["perf"]["compilations"] for line in text.splitlines()]

    def compiled_late(self, name):
        """Names of functions that were compiled, or read from the cache, after those compiled ahead of step 1."""
        log = (self.logs / f"{name}-0.log").read_text()
        ahead, reported, later = log.rpartition(re.search(r"compiled (\d+) of \1 programs", log)[0])
        assert reported
        assert "Finished XLA compilation of" in ahead
        return set(re.findall(r"Finished XLA compilation of jit\((\w+)\)", later))

    def until(self, name, process, step):
        """Wait for the metrics of a step, or the end of the process."""
        path = self.folder / name / "metrics.jsonl"
        while process.poll() is None and not (path.exists() and path.read_text().count("\n") >= step):
            time.sleep(0.02)

    def files(self, name):
        """The parameters of the newest step, every leaf as numpy."""
        from avocado_jax.checkpoint.load import load_params, open_checkpoint

        return load_params(open_checkpoint(self.folder / name), "float32")


def write_checkpoint(folder):
    """A Hugging Face checkpoint with random weights and one layer a tower, which compiles fast."""
    with mock.patch.dict(SIZES, tiny=ONE_LAYER), mock.patch.object(sys, "argv", [SCRIPT.name, str(folder)]):
        assert runpy.run_path(str(SCRIPT))["main"]() == 0


def kill(process, number=signal.SIGKILL):
    """Send a signal and wait for the end."""
    process.send_signal(number)
    return process.wait(timeout=120)

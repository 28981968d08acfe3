"""Rehearse a job on a TPU pod with four hosts on one machine: a host is lost, two hosts finish the run.

  python tests/launch/rehearse.py [sft|grpo] FOLDER

Checkpoint, shards, run folder and compile cache are in a bucket of a storage server. Hosts run the launchers' command,
with their devices in the interleaved order of a v5p slice. One host is lost: all others must end with 75. The job
starts again on two hosts, as on a smaller slice; it is stopped by SIGTERM, starts once more on the same hosts, compiles
nothing and finishes. An undisturbed SFT run on one host is the reference. Prints the findings as JSON.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "launch")]
os.environ["JAX_PLATFORMS"] = "cpu"

import gcs  # noqa: E402
from device_order import process_order  # noqa: E402
from hosts import hosts  # noqa: E402
from job import job_of  # noqa: E402
from train_runs import write_checkpoint  # noqa: E402

from avocado_jax.data import storage  # noqa: E402

RECORDS, BATCH, EPOCHS = 12, 8, 4
STEPS = EPOCHS * -(-RECORDS // BATCH)
FIELDS = ["--init", "gs://bucket/base", "--data.train", "gs://bucket/train", "--data.caption_tokens", "48"]
FIELDS += ["--data.shapes", "1", "--batch", str(BATCH), "--steps", str(STEPS), "--checkpoint_every", "2"]
FIELDS += ["--tensorboard", "false", "--timeouts.heartbeat", "10"]  # 60 by default: the rehearsal waits for it
HELD_OUT = ["--data.heldout", "gs://bucket/test", "--eval_every", "3", "--eval_rows", "8", "--samples", "0"]
SAMPLED = ["--group", "2", "--sampling.tokens", "24", "--rewards.low", "8", "--rewards.high", "24"]
CONFIGS = {
    "sft": ("configs/world_tiny.py", HELD_OUT),
    "grpo": ("configs/grpo_world.py", [*SAMPLED, "--data.heldout", ""]),
}
CHIPS = 2  # of a host
FOUR, TWO = "v6e:2x4", "v6e:2x2"  # slices of four hosts and of two
ORDERS = {4: "v5p:2x2x4", 2: "v5p:2x2x2"}  # hosts -> slice of so many hosts, whose device order is used
PYTHON = sys.executable


def job(stage, workdir, topology):
    """The command that the launchers build for every host."""
    config, more = CONFIGS[stage]
    args = Namespace(stage=stage, words=[config, "--workdir", workdir, *FIELDS, *more], topology=topology, slices=1)
    args.env, args.secret, args.unplanned, args.name = [], [], True, "r"
    return list(job_of(args).words)


def python(*words):
    command = [PYTHON, *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT, stdout=sys.stderr)


def avocado(*words):
    python("-m", "avocado_jax", *words)


def fill(folder):
    """Write a checkpoint and prepared clips to the bucket."""
    write_checkpoint(folder / "hf")
    avocado("convert", "from-hf", folder / "hf", folder / "base")
    for path in (folder / "base").rglob("*"):
        if path.is_file():
            storage.write(f"gs://bucket/{path.relative_to(folder)}", path.read_bytes())
    for split, clips in (("train", RECORDS), ("test", 8)):
        avocado("world", folder / split, "--clips", clips, "--level", 0, "--references", 0, "--split", split)
        manifest, reading = folder / split / "clips.jsonl", ("--features", "--reading", "fewest_pixels=784")
        avocado("prepare", manifest, f"gs://bucket/{split}", *reading, "--workers", 1)


class Pod:
    """Hosts that run the command of a stage."""

    def __init__(self, hosts, folder):
        self.hosts, self.folder, self.bucket = hosts, folder, folder / "storage" / "bucket"
        self.orders = {count: process_order(slice, each=CHIPS) for count, slice in ORDERS.items()}
        command = folder / "avocado"
        command.write_text(f'#!/bin/sh\nexec {PYTHON} {ROOT}/tests/launch/host.py "$@"\n')
        command.chmod(0o755)
        self.env = os.environ | {
            "AVOCADO": str(command),
            "AVOCADO_PYTHON": PYTHON,
            "PYTHONPATH": str(ROOT),
            "JAX_FORCE_TPU_INIT": "1",  # jax finds the other hosts as on a TPU
            "MEGASCALE_COORDINATOR_ADDRESS": "",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
        }

    def start(self, name, command, count, chips=CHIPS):
        """Start a command on the first `count` hosts, with the environment variables that GKE sets on each."""
        flags = f"--xla_force_host_platform_device_count={chips} --xla_backend_optimization_level=0"
        flags += " --xla_llvm_disable_expensive_passes=true"  # most of the time is compilation
        flags += " --xla_cpu_collective_timeout_seconds=600"  # default 30: too short for hosts that share two cores
        order = self.orders.get(count, [0] * chips)
        peers = {"TPU_WORKER_HOSTNAMES": ",".join(self.hosts.names[:count]), "XLA_FLAGS": flags}
        peers |= {"DEVICE_ORDER": json.dumps(order)}
        return [
            self.hosts.start(number, command, self.env | peers | {"TPU_WORKER_ID": str(number)}, self.log(name, number))
            for number in range(count)
        ]

    def log(self, name, number=0):
        """The log file of a host."""
        return self.folder / f"{name}-{number}.log"

    def finish(self, name, processes, expect=0):
        """Wait until all hosts have ended with the status `expect`."""
        statuses = [process.wait(timeout=1500) for process in processes]
        assert set(statuses) == {expect}, f"{statuses}: {self.log(name).read_text()[-3000:]}"

    def until_step(self, name, processes):
        """Wait until a started command reports its first step; returns the number of that step."""
        while (step := re.search(r"^step (\d+) of", self.log(name).read_text(), re.M)) is None:
            assert all(process.poll() is None for process in processes), self.log(name).read_text()[-3000:]
            time.sleep(0.05)
        return int(step[1])

    def cache_misses(self, name, number):
        """Names of the programs that a host compiled."""
        return re.findall(r"COMPILATION CACHE MISS for '(\w+)'", self.log(name, number).read_text())

    def lines(self, run):
        """metrics.jsonl of a run."""
        return [json.loads(line) for line in (self.bucket / run / "metrics.jsonl").read_text().splitlines()]


def rehearse(stage, folder):
    """Run the rehearsal. Returns the findings."""
    (folder / "storage" / "bucket").mkdir(parents=True)
    with hosts(4, folder) as made, gcs.storage_server(folder / "storage", made.outside) as port:
        url = f"http://{made.outside}:{port}"
        os.environ |= {"STORAGE_EMULATOR_HOST": url, "CLOUD_STORAGE_EMULATOR_ENDPOINT": url}
        pod = Pod(made, folder)
        fill(folder)

        if stage == "sft":  # GRPO samples: its captions depend on rounding, which differs between meshes
            pod.finish("whole", pod.start("whole", job(stage, "gs://bucket/whole", FOUR), 1, chips=4 * CHIPS))

        processes = pod.start("broken", job(stage, "gs://bucket/broken", FOUR), 4)
        saved = pod.bucket / "broken" / "checkpoints" / "2" / "commit_success.txt"
        while not saved.exists():
            assert all(process.poll() is None for process in processes), pod.log("broken").read_text()[-3000:]
            time.sleep(0.05)
        made.lose(2)
        lost = time.monotonic()
        statuses = [processes[number].wait(timeout=300) for number in (0, 1, 3)]
        detected = time.monotonic() - lost

        again = time.monotonic()
        processes = pod.start("again", job(stage, "gs://bucket/broken", TWO), 2)
        resumed = pod.until_step("again", processes)
        recovered = time.monotonic() - again
        processes[0].terminate()  # both hosts save and stop
        pod.finish("again", processes, expect=75)
        second = time.monotonic()
        processes = pod.start("second", job(stage, "gs://bucket/broken", TWO), 2)
        continued = pod.until_step("second", processes)
        restarted = time.monotonic() - second
        pod.finish("second", processes)

        found = {"stage": stage, "namespaces": made.isolated, "orders": pod.orders, "statuses": statuses}
        found |= {"log": pod.log("broken").read_text(), "broken": pod.lines("broken")}
        found |= {"seconds_to_detect": round(detected, 1), "seconds_to_recover": round(recovered, 1)}
        found |= {"seconds_to_restart": round(restarted, 1)}
        found |= {"resumed_after": resumed - 1, "continued_after": continued - 1}
        found["cache_misses"] = {
            name: [pod.cache_misses(name, number) for number in range(2)] for name in ("again", "second")
        }
        if stage == "sft":
            found["whole"] = pod.lines("whole")
        else:
            found["rollouts"] = [
                [json.loads(line) for line in (pod.bucket / "broken" / f"rollouts/{step + 1}.jsonl").open()]
                for step in range(STEPS)
            ]
        return found


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # runs the cleanup of `hosts`
    print(json.dumps(rehearse(sys.argv[1], Path(sys.argv[2]))))

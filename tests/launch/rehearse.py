"""A pod rehearsed on one machine: four hosts, a bucket, the launchers' own command; a host is lost, two go on.

  python tests/launch/rehearse.py [sft|grpo] FOLDER

Checkpoint and shards are made and put into a bucket of a real storage server. An undisturbed run (of sft) is the
measure. The other one loses a host: all others must end by themselves, with 75; then the job is started on two
hosts, as on a smaller slice, and finishes. Prints what it found, as JSON.
"""

import json
import os
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "launch")]

import gcs  # noqa: E402
from hosts import hosts  # noqa: E402
from job import job_of  # noqa: E402

from avocado_jax.data import storage  # noqa: E402

RECORDS, BATCH, EPOCHS = 20, 8, 2
STEPS = EPOCHS * -(-RECORDS // BATCH)
FIELDS = ["--init", "gs://bucket/base", "--data.train", "gs://bucket/train", "--data.caption_tokens", "48"]
FIELDS += ["--data.shapes", "1", "--batch", str(BATCH), "--steps", str(STEPS), "--checkpoint_every", "2"]
HELD_OUT = ["--data.heldout", "gs://bucket/test", "--eval_every", str(STEPS), "--eval_rows", "8", "--samples", "0"]
SAMPLED = ["--group", "2", "--sampling.tokens", "24", "--rewards.low", "8", "--rewards.high", "24"]
CONFIGS = {
    "sft": ("configs/world_tiny.py", HELD_OUT),
    "grpo": ("configs/grpo_world.py", [*SAMPLED, "--data.heldout", ""]),
}
FOUR, TWO = "v6e:2x4", "v6e:2x2"  # slices of eight chips and of four: a host has two
CHIPS = 2
PYTHON = sys.executable


def job(stage, workdir, topology):
    """The command of every host, as each of the launchers would give it."""
    config, more = CONFIGS[stage]
    args = Namespace(stage=stage, config=config, workdir=workdir, topology=topology, slices=1, unplanned=True, name="r")
    return list(job_of(args, [*FIELDS, *more]).words)


def python(*words):
    command = [PYTHON, *map(str, words)]
    subprocess.run(command, check=True, env=os.environ | {"JAX_PLATFORMS": "cpu"}, cwd=ROOT, stdout=sys.stderr)


def avocado(*words):
    python("-m", "avocado_jax", *words)


def fill(folder):
    """A checkpoint and prepared clips, in the bucket."""
    python("launch/random_checkpoint.py", folder / "hf", "--size", "tiny")
    avocado("convert", "from-hf", folder / "hf", folder / "base")
    for path in (folder / "base").rglob("*"):
        if path.is_file():
            storage.write(f"gs://bucket/{path.relative_to(folder)}", path.read_bytes())
    for split, clips in (("train", RECORDS), ("test", 8)):
        avocado("world", folder / split, "--clips", clips, "--level", 0, "--references", 0, "--split", split)
        manifest, reading = folder / split / "clips.jsonl", ("--features", "--reading", "fewest_pixels=784")
        avocado("prepare", manifest, f"gs://bucket/{split}", *reading, "--workers", 1)


class Pod:
    """Hosts that run a stage's command."""

    def __init__(self, hosts, folder):
        self.hosts, self.folder, self.bucket = hosts, folder, folder / "storage" / "bucket"
        self.env = os.environ | {
            "AVOCADO": str(Path(PYTHON).parent / "avocado"),
            "AVOCADO_PYTHON": PYTHON,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_FORCE_TPU_INIT": "1",  # jax looks for its peers as on a TPU
            "MEGASCALE_COORDINATOR_ADDRESS": "",
            "MEGASCALE_NUM_SLICES": "1",
            "MEGASCALE_SLICE_ID": "0",
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }

    def start(self, name, command, count, chips=CHIPS):
        """Start a command on the first `count` hosts; GKE tells each its number and all names in the same way."""
        flags = f"--xla_force_host_platform_device_count={chips} --xla_backend_optimization_level=0"
        flags += " --xla_llvm_disable_expensive_passes=true"  # nearly all of the time is compilation
        flags += " --xla_cpu_collective_timeout_seconds=600"  # 30 by default: hosts that share two cores part by more
        peers = {"TPU_WORKER_HOSTNAMES": ",".join(self.hosts.names[:count]), "XLA_FLAGS": flags}
        return [
            self.hosts.start(number, command, self.env | peers | {"TPU_WORKER_ID": str(number)}, self.log(name, number))
            for number in range(count)
        ]

    def log(self, name, number=0):
        """The file of what a host said."""
        return self.folder / f"{name}-{number}.log"

    def finish(self, name, processes):
        """Wait for the end of all."""
        statuses = [process.wait(timeout=1500) for process in processes]
        assert not any(statuses), f"{statuses}: {self.log(name).read_text()[-3000:]}"

    def lines(self, run):
        """Metrics of a run without what depends on the clock."""
        text = (self.bucket / run / "metrics.jsonl").read_text()
        return [{key: value for key, value in json.loads(line).items() if key != "perf"} for line in text.splitlines()]


def rehearse(stage, folder):
    """Play it through; gives what was found."""
    (folder / "storage" / "bucket").mkdir(parents=True)
    with hosts(4, folder) as made, gcs.storage_server(folder / "storage", made.outside) as port:
        url = f"http://{made.outside}:{port}"
        os.environ |= {"STORAGE_EMULATOR_HOST": url, "CLOUD_STORAGE_EMULATOR_ENDPOINT": url}
        pod = Pod(made, folder)
        fill(folder)

        if stage == "sft":  # what is sampled hangs on the last bits, which differ between meshes
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
        while "step " not in pod.log("again").read_text():
            assert all(process.poll() is None for process in processes), pod.log("again").read_text()[-3000:]
            time.sleep(0.05)
        recovered = time.monotonic() - again
        pod.finish("again", processes)

        found = {"stage": stage, "apart": made.apart, "statuses": statuses, "said": pod.log("broken").read_text()}
        found |= {"seconds_to_detect": round(detected, 1), "seconds_to_recover": round(recovered, 1)}
        found |= {"resumed_after": _first_step(pod.log("again").read_text()) - 1}
        found["broken"] = pod.lines("broken")
        if stage == "sft":
            found["whole"] = pod.lines("whole")
        else:
            found["rollouts"] = [
                [json.loads(line) for line in (pod.bucket / "broken" / f"rollouts/{step + 1}.jsonl").open()]
                for step in range(STEPS)
            ]
        return found


def _first_step(log):
    return int(log.partition("step ")[2].partition(" ")[0])


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what leaves nothing behind
    print(json.dumps(rehearse(sys.argv[1], Path(sys.argv[2]))))

"""worker.sh and env.sh: what a host is told, and how its command's end is passed on."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
WORKER = ["bash", "launch/worker.sh", "sft", "configs/x.py", "--workdir", "gs://bucket/a b"]


@pytest.fixture
def worker(tmp_path):
    """`worker(script)` starts worker.sh over a command of ours."""

    def started(script, **env):
        command = tmp_path / "avocado"
        command.write_text(f"#!/usr/bin/env bash\n{script}\n")
        command.chmod(0o755)
        env = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")} | env
        env |= {"AVOCADO": str(command)}
        return subprocess.Popen(WORKER, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return started


@pytest.mark.parametrize(("end", "status"), [("exit 0", 0), ("exit 1", 1), ("exit 2", 2), ("exit 75", 75)])
def test_statuses_are_passed_on(worker, end, status):
    process = worker(f'printf "%s\\n" "$@"; {end}')
    said, complained = process.communicate(timeout=60)
    assert said.splitlines() == WORKER[2:]  # each argument whole
    assert (process.returncode, complained) == (status, "")


def test_a_lost_host_is_resumable(worker):
    """jax ends a process by SIGABRT when another is lost."""
    process = worker("ulimit -c 0; kill -ABRT $$")
    _, complained = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "a host of this job was lost" in complained


def test_sigterm_reaches_the_command(worker):
    """It saves in its own time; worker.sh ends with its status, not before it."""
    process = worker("trap 'echo saving; exit 75' TERM; echo ready; while :; do read -rt 1 <> <(:); done")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert (process.returncode, said) == (75, "saving\n")


def test_what_hosts_are_told(worker):
    said, _ = worker("env", MEGASCALE_NUM_SLICES="2").communicate(timeout=60)
    told = dict(line.split("=", 1) for line in said.splitlines() if "=" in line)
    assert told["JAX_COORDINATOR_PORT"] == "8476"
    assert told["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] == "false"
    assert told["JAX_COMPILATION_CACHE_DIR"] == "/tmp/avocado-compiled"
    assert told["LIBTPU_INIT_ARGS"].split() == [
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ]
    said, _ = worker("env", JAX_COMPILATION_CACHE_DIR="gs://bucket/compiled").communicate(timeout=60)
    assert "JAX_COMPILATION_CACHE_DIR=gs://bucket/compiled" in said.splitlines()
    assert "LIBTPU_INIT_ARGS" not in said

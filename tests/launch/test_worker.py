"""worker.sh: the environment of the command, and the exit status that the launcher receives."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import gcs
import pytest

from avocado_jax.data import storage
from avocado_jax.train import supervisor

ROOT = Path(__file__).parents[2]


@pytest.fixture
def worker(tmp_path):
    """`worker(script)` starts worker.sh with this command, as one of the hosts of a run in `tmp_path`."""

    def started(script, host="0", launch="first", run=tmp_path / "a run", more=(), **env):
        command = tmp_path / f"avocado-{host}"
        command.write_text(f"#!/usr/bin/env bash\n{script}\n")
        command.chmod(0o755)
        env = {key: value for key, value in os.environ.items() if not key.startswith("OPENBLAS")} | env
        env |= {"AVOCADO": str(command), "AVOCADO_PYTHON": sys.executable, "AVOCADO_LAUNCH": launch}
        words = ["bash", "launch/worker.sh", "sft", "configs/x.py", "--workdir", str(run), "--process", host, *more]
        return subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    return started


def wait_for_end(process):
    """Exit status, stdout, stderr."""
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


@pytest.mark.parametrize("status", [0, 2, 3, 75])
def test_statuses_are_passed_on(worker, tmp_path, status):
    ended, out, err = wait_for_end(worker(f'printf "%s\\n" "$@"; exit {status}'))
    words = ["sft", "configs/x.py", "--workdir", str(tmp_path / "a run"), "--process", "0"]
    assert out.splitlines() == words  # arguments are not split
    assert (ended, err) == (status, "")


def test_lost_host_exits_with_75(worker):
    """jax ends a process by SIGABRT when another is lost."""
    status, _, err = wait_for_end(worker("ulimit -c 0; kill -ABRT $$", launch=""))
    assert status == 75
    assert "a host of this job was lost" in err


def test_sigterm_reaches_the_command(worker):
    """worker.sh waits until the command has saved, and exits with its status."""
    process = worker("trap 'echo saving; exit 75' TERM; echo ready; while :; do read -rt 1 <> <(:); done")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert wait_for_end(process)[:2] == (75, "saving\n")


def test_sigterm_during_the_start_of_the_command(monkeypatch):
    """Otherwise it would end the supervisor and leave the command running."""
    real = subprocess.Popen

    def start(command):
        child = real(command)
        os.kill(os.getpid(), signal.SIGTERM)
        return child

    monkeypatch.setattr(supervisor.subprocess, "Popen", start)
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        assert supervisor.supervise(["sleep", "5"], "", "") == 128 + signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)


def test_environment_of_a_host(worker):
    _, out, _ = wait_for_end(worker("env", more=("--mesh.slices", "2")))
    env = dict(line.split("=", 1) for line in out.splitlines() if "=" in line)
    assert env["JAX_COORDINATOR_PORT"] == "8476"
    assert env["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] == "false"
    assert "JAX_COMPILATION_CACHE_DIR" not in env  # the run folder holds the cache
    assert env["LIBTPU_INIT_ARGS"].split() == [
        "--xla_tpu_enable_data_parallel_all_reduce_opt=true",
        "--xla_tpu_data_parallel_opt_different_sized_ops=true",
    ]
    _, out, _ = wait_for_end(
        worker("env", JAX_COMPILATION_CACHE_DIR="gs://bucket/compiled", more=("--mesh.slices", "1"))
    )
    assert "JAX_COMPILATION_CACHE_DIR=gs://bucket/compiled" in out.splitlines()
    assert "LIBTPU_INIT_ARGS" not in out


PEERS = """
import os, sys, time, jax
from avocado_jax.config import TimeoutConfig
from avocado_jax.errors import report
from avocado_jax.parallel.processes import init_distributed
jax.config.update("jax_platforms", "cpu")
number = int(sys.argv[-1])
try:
    with init_distributed("127.0.0.1:PORT", 2, number, None, TimeoutConfig(60, 5, 0)):
        from jax.experimental import multihost_utils
        multihost_utils.sync_global_devices("start")
        if number == FAILING:
            raise KeyError("a bug")
        time.sleep(100)  # as in a collective that never ends
except Exception as error:
    sys.exit(report(error, "sft"))
"""


@pytest.mark.parametrize("failing", [0, 1])
def test_internal_error_of_one_host_ends_the_job_with_3(worker, tmp_path, failing):
    """jax aborts the other host, which must not request a restart."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        program = PEERS.replace("PORT", str(reserved.getsockname()[1])).replace("FAILING", str(failing))
    (tmp_path / "peers.py").write_text(program)
    script = f'ulimit -c 0; exec {sys.executable} {tmp_path}/peers.py "${{@: -1}}"'
    peers = [worker(script, host=str(host), PYTHONPATH=str(ROOT)) for host in range(2)]
    ends = [wait_for_end(peer) for peer in peers]
    assert [status for status, _, _ in ends] == [3, 3], ends
    assert ends[failing][2].splitlines()[-1] == "avocado sft: KeyError: 'a bug'"
    assert f"host {socket.gethostname()} ended with status 3" in ends[1 - failing][2]
    # A host that is restarted in this launch exits at once; a later launch ignores the record.
    assert wait_for_end(worker("exit 0"))[0] == 3
    assert wait_for_end(worker("exit 0", launch="second"))[0] == 0


def test_waiting_hosts_exit_with_the_status_of_the_failed_host(tmp_path, monkeypatch):
    """Before jax.distributed is initialised jax does not abort them."""
    monkeypatch.setattr(supervisor, "POLL_SECONDS", 0.1)
    run = str(tmp_path)
    supervisor.record_failure(run, "first", 2)
    begun = time.monotonic()
    assert supervisor.supervise(["sleep", "100"], run, "first") == 2
    assert time.monotonic() - begun < 10


def test_preemptions_are_not_failures(tmp_path, monkeypatch):
    monkeypatch.setattr(supervisor, "RECORD_SECONDS", 0.0)
    run = str(tmp_path)
    for script, status in (("exit 75", 75), ("exit 1", 1), ("kill -TERM $$", 143), ("kill -KILL $$", 137)):
        assert supervisor.supervise(["sh", "-c", script], run, "first") == status
    assert supervisor.read_failure(run, "first") is None


def test_unreachable_run_folder_exits_with_75(tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise storage.StorageError("gs://b: 503")

    monkeypatch.setattr(supervisor, "RECORD_SECONDS", 0.0)
    monkeypatch.setattr(storage, "read", fail)
    assert supervisor.supervise(["sh", "-c", "ulimit -c 0; kill -ABRT $$"], str(tmp_path), "first") == 75
    assert supervisor.main(["true", "--workdir", str(tmp_path)]) == 75
    assert "503" in capsys.readouterr().err


def write_metrics(run, steps):
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": step + 1}) + "\n" for step in range(steps)) + '{"st')


def test_50_starts_without_a_new_step_exit_with_3(worker, tmp_path):
    run = tmp_path / "a run"
    for start in range(1, 50):
        assert supervisor.count_start(str(run), "first", "0-0") == start
    assert wait_for_end(worker("exit 75"))[0] == 75  # the 50th
    status, _, err = wait_for_end(worker("exit 75"))
    assert (status, err) == (3, f"launch: {run}: 50 starts without a newly finished step; their logs have the reason\n")
    assert wait_for_end(worker("exit 75", host="1"))[0] == 3  # the other hosts too
    assert wait_for_end(worker("exit 75", launch="second"))[0] == 75  # the user has started it again


def test_newly_finished_step_resets_the_count(tmp_path):
    def count(launch="first", host="0"):
        return supervisor.count_start(str(tmp_path), launch, host)

    assert [count(), count()] == [1, 2]
    write_metrics(tmp_path, 7)
    assert [count(), count()] == [1, 2]
    write_metrics(tmp_path, 5)  # a restart from an older checkpoint
    assert count() == 3
    write_metrics(tmp_path, 7)  # finished a second time: nothing new
    assert count() == 4
    assert count(host="1") == 1  # each host has its own count
    write_metrics(tmp_path, 8)
    assert count() == 1
    assert count() == 2
    assert count(launch="second") == 1


def test_starts_are_counted_in_a_bucket(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    with gcs.storage_server(tmp_path) as port:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{port}")
        storage._client.cache_clear()
        run = "gs://bucket/run"
        assert [supervisor.count_start(run, "first", "0") for _ in range(2)] == [1, 2]
        storage.write(f"{run}/metrics.jsonl", b'{"step": 1}\n')
        assert supervisor.count_start(run, "first", "0") == 1
        assert supervisor.read_failure(run, "first") is None
        supervisor.record_failure(run, "first", 3)
        supervisor.record_failure(run, "first", 2)  # a second host that fails changes nothing
        assert supervisor.read_failure(run, "first")["status"] == 3
        assert supervisor.read_failure(run, "second") is None
    storage._client.cache_clear()


def test_missing_command_is_not_retried(tmp_path):
    assert supervisor.main([str(tmp_path / "nothing"), "--workdir", str(tmp_path)]) == 3

"""Several processes: equal loss curves, lost and hanging processes, resumption with another number."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_runs import kill

ROOT = Path(__file__).parents[2]

CLOSE = dict(rel=1e-4, abs=1e-6)


def assert_same_curve(lines, others):
    for line, other in zip(lines, others, strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            assert value == pytest.approx(other[name], **CLOSE), name


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [("8", "1", "1"), ("1", "4", "2")])
def test_four_processes_give_the_loss_curve_of_one(runs, mesh):
    fields = [f"--mesh.{axis}={size}" for axis, size in zip(("data", "fsdp", "tensor"), mesh)]
    name = f"four-{'-'.join(mesh)}"
    runs.finish(name, *fields, processes=4)
    assert_same_curve(runs.lines(name), runs.lines("undisturbed"))


@pytest.mark.slow
def test_lost_process_ends_the_others_and_the_job_resumes(runs):
    processes = runs.start("lost", "--timeouts.heartbeat", "10", processes=4)
    runs.until("lost", processes[0], 3)
    kill(processes[2])
    begun = time.monotonic()
    statuses = [process.wait(timeout=60) for process in processes]
    assert time.monotonic() - begun < 30
    assert all(statuses)
    runs.finish("lost", processes=2, devices=4)  # two hosts are left
    assert_same_curve(runs.lines("lost"), runs.lines("undisturbed"))


@pytest.mark.slow
def test_sigterm_of_one_process_of_two_stops_both(runs):
    processes = runs.start("stopped", processes=2)
    runs.until("stopped", processes[0], 1)
    processes[1].terminate()
    assert [process.wait(timeout=120) for process in processes] == [75, 75]
    runs.finish("stopped", processes=2)
    assert_same_curve(runs.lines("stopped"), runs.lines("undisturbed"))


# Host 2 gets stuck in its third batch.
STUCK = """
import os, signal, sys
sys.path[:0] = ["TESTS"]
from avocado_jax.config import TimeoutConfig
from avocado_jax.parallel.processes import init_distributed
from tiny_run import tiny_run
number = int(sys.argv[-1])

def stuck(step):
    if number != 2 or step != 3:
        return
    print("stuck in its third batch", flush=True)
    if "HOW" == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    while "HOW" == "loop":
        pass

with init_distributed("127.0.0.1:PORT", 4, number, None, TimeoutConfig(120, HEARTBEAT, LIMIT)):
    sys.exit(tiny_run(stuck)[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "heartbeat", "limit", "within"), [("stop", 8, 100, 30), ("loop", 60, 10, 30)])
def test_hanging_host_is_named_and_all_exit_with_75(tmp_path, how, heartbeat, limit, within):
    """Through worker.sh, as in launchers. A stopped process cannot exit: it continues after the others have exited."""
    with socket.socket() as reserved:
        reserved.bind(("127.0.0.1", 0))
        values = {"TESTS": ROOT / "tests", "HOW": how, "PORT": reserved.getsockname()[1]}
    program = STUCK
    for name, value in (values | {"HEARTBEAT": heartbeat, "LIMIT": limit}).items():
        program = program.replace(name, str(value))
    (tmp_path / "program.py").write_text(program)
    command = tmp_path / "avocado"
    command.write_text(f'#!/bin/bash\nulimit -c 0\nexec {sys.executable} {tmp_path}/program.py "${{@: -1}}"\n')
    command.chmod(0o755)
    env = os.environ | {"AVOCADO": str(command), "AVOCADO_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    env |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "AVOCADO_LAUNCH": "one"}
    logs = [tmp_path / f"{number}.log" for number in range(4)]
    workers = []
    for number, log in enumerate(logs):
        words = ["bash", "launch/worker.sh", "sft", "x.py", "--workdir", str(tmp_path), "--process", str(number)]
        workers.append(subprocess.Popen(words, cwd=ROOT, env=env, stdout=log.open("w"), stderr=subprocess.STDOUT))
    while "third batch" not in logs[2].read_text():
        assert all(worker.poll() is None for worker in workers), [log.read_text()[-2000:] for log in logs]
        time.sleep(0.1)
    begun = time.monotonic()
    others = [number for number in range(4) if not (how == "stop" and number == 2)]
    assert [workers[number].wait(timeout=120) for number in others] == [75] * len(others)
    print(f"{how}: {time.monotonic() - begun:.1f} s until all hosts ended")
    assert time.monotonic() - begun < within
    if how == "stop":
        (child,) = Path(f"/proc/{workers[2].pid}/task/{workers[2].pid}/children").read_text().split()
        os.kill(int(child), signal.SIGCONT)
        assert workers[2].wait(timeout=120) == 75
    name = f"host 2 ({socket.gethostname()})"
    for number in others:
        assert (f"{name}: no heartbeat" if how == "stop" else f"stuck: {name}") in logs[number].read_text()
    if how == "loop":
        assert "in stuck" in logs[2].read_text()  # its stacks show where

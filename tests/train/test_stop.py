"""Flags that all processes read at the same step, and signals before and after the first step."""

import subprocess
import sys
from pathlib import Path

import pytest
from processes import run_connected

TESTS = str(Path(__file__).parents[1])


def test_flags_are_equal_on_every_process():
    """Process 1 gets SIGTERM, the clock of process 0 triggers a save, and the clock of process 1 is ignored."""
    program = """
    import os, signal, sys
    from avocado_jax.parallel.mesh import make_mesh
    from avocado_jax.train.stop import StepFlags
    me = int(sys.argv[-1])
    flags = StepFlags(make_mesh(-1, 1, 1))
    flags.step_finished()
    read = [flags.dispatch(save=False), flags.dispatch(save=me == 1), flags.dispatch(save=me == 0)]
    if me == 1:
        os.kill(os.getpid(), signal.SIGTERM)
        assert flags._stop.wait(30)
    read.append(flags.dispatch(save=False))
    print([[int(value) for value in one] for one in read])
    """
    assert {text.splitlines()[-1] for text in run_connected(program, 2, 2)} == {"[[0, 0], [0, 0], [0, 1], [1, 0]]"}


@pytest.mark.parametrize(
    ("signals", "finished", "status"),
    [("TERM", False, 75), ("INT INT", True, 75), ("INT TERM", True, 0)],
)
def test_signal_exits_at_once_only_before_the_first_step(signals, finished, status):
    program = f"""
import os, signal, time
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.stop import StepFlags
flags = StepFlags(make_mesh(-1, 1, 1))
if {finished}:
    flags.step_finished()
for name in "{signals}".split():
    os.kill(os.getpid(), getattr(signal, "SIG" + name))
    time.sleep(0.3)
print("running", bool(flags.dispatch(save=False)[0]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == status, done.stderr
    assert done.stdout == ("" if status else "running True\n")
    assert done.stderr.count("\n") == 1
    assert ("the same command resumes" in done.stderr) != finished


@pytest.mark.parametrize(("where", "saved"), [("evaluate", "[3]"), ("skipped_in_row", "[4]")])
def test_stop_during_an_evaluation_or_a_step_saves(where, saved):
    """During an evaluation its step is saved. During the dispatch of a step, the next one is already running."""
    program = f"""
import os, signal, sys, time
sys.path.insert(0, {TESTS!r})
from tiny_run import tiny_run
def stop(*arguments):
    if arguments[-1] == 3:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.5)
    return {{}} if {where!r} == "evaluate" else 0
status, storage = tiny_run(**{{{where!r}: stop}}, steps=6, eval_every={3 * (where == "evaluate")})
print(status, storage.saved, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stdout == f"75 {saved}\n", done.stderr
    assert f"saved step {saved.strip('[]')} of 6; the same command resumes\n" in done.stderr

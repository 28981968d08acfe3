"""If a test process dies, the test run ends at once, and its last line names the process and the test."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
DIES = """
import os, signal, time

def test_dies():
    time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
"""
LONG = """
import time

def test_long():
    time.sleep(200)

def test_behind_it():
    time.sleep(200)
"""


@pytest.mark.slow
def test_dead_worker_fails_the_test_run(tmp_path):
    (tmp_path / "test_dies.py").write_text(DIES)
    (tmp_path / "test_long.py").write_text(LONG)
    command = [sys.executable, "-m", "pytest", "-p", "conftest", "--rootdir", tmp_path, tmp_path, "--numprocesses", "2"]
    command += ["--dist", "loadfile", "--max-worker-restart=0"]
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)])}
    with subprocess.Popen(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True) as run:
        lines = []
        for line in run.stdout:
            if "node down" in line:
                died = time.monotonic()
            lines.append(line)
    assert time.monotonic() - died < 60
    assert run.returncode == 1
    assert re.search(r"Exit: test process gw\d died in test_dies.py::test_dies !", lines[-1])

"""One undisturbed run that others are compared with."""

import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import Runs

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    script = ROOT / "launch" / "random_checkpoint.py"
    subprocess.run([sys.executable, script, folder / "init", "--size", "tiny"], check=True, capture_output=True)
    made = Runs(folder, folder / "init")
    made.finish("undisturbed")
    return made

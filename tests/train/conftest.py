"""One undisturbed run that others are compared with."""

import subprocess
import sys
from pathlib import Path

import pytest
from train_runs import GRPO, Runs

ROOT = Path(__file__).parents[2]


def made(folder, *options):
    script = ROOT / "launch" / "random_checkpoint.py"
    subprocess.run([sys.executable, script, folder / "init", "--size", "tiny"], check=True, capture_output=True)
    runs = Runs(folder, folder / "init", *options)
    runs.finish("undisturbed", "--tensorboard", "true")
    return runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return made(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def grpo_runs(tmp_path_factory):
    return made(tmp_path_factory.mktemp("grpo"), "grpo", GRPO)

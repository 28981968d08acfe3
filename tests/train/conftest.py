"""Fixtures: undisturbed runs for comparison."""

import pytest
from train_runs import GRPO, Runs, write_checkpoint


def make_runs(folder, *options):
    write_checkpoint(folder / "init")
    runs = Runs(folder, folder / "init", *options)
    runs.finish("undisturbed", "--tensorboard", "true")
    return runs


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture(scope="session")
def grpo_runs(tmp_path_factory):
    return make_runs(tmp_path_factory.mktemp("grpo"), "grpo", GRPO)

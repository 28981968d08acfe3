"""`--deterministic` and `--debug-nans`: JAX settings before a backend starts, and runs that end at a NaN."""

import importlib
import os
from contextlib import contextmanager

import jax
import pytest

from avocado_jax.__main__ import main


@pytest.fixture
def started(tmp_path, monkeypatch):
    """Start a command with flags. Returns the settings when it initialises jax.distributed and when it trains."""

    def start(name, *flags):
        settings = []

        def record(*_):
            settings.append((os.environ["XLA_FLAGS"], jax.config.jax_debug_nans))
            return 0

        @contextmanager
        def init_distributed(*_):
            record()
            yield

        monkeypatch.setenv("XLA_FLAGS", "--xla_dump_to=/nowhere")
        monkeypatch.setattr(f"avocado_jax.cli.{name}.init_distributed", init_distributed)
        monkeypatch.setattr("avocado_jax.parallel.compiled.use_cache", lambda _: None)
        module = importlib.import_module({"sft": "avocado_jax.train.run", "grpo": "avocado_jax.train.run_grpo"}[name])
        monkeypatch.setattr(module, name, record)
        kind = {"sft": "SftConfig", "grpo": "GrpoConfig"}[name]
        (tmp_path / "c.py").write_text(f"from avocado_jax.config import {kind}\nconfig = {kind}()\n")
        assert main([name, str(tmp_path / "c.py"), "--workdir", "run", *flags]) == 0
        return settings

    yield start
    jax.config.update("jax_debug_nans", False)


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_flags_apply_before_a_backend_starts(command, started):
    before = "--xla_dump_to=/nowhere"
    assert started(command) == [(before, False)] * 2
    assert started(command, "--deterministic") == [(f"{before} --xla_gpu_deterministic_ops=true", False)] * 2
    assert started(command, "--debug-nans") == [(before, True)] * 2


@pytest.mark.parametrize("command", ["sft", "grpo"])
def test_help_lists_debugging_flags(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "\n  --deterministic" in text
    assert "\n  --debug-nans" in text


@pytest.mark.slow
def test_the_first_nan_ends_the_run(runs):
    """Weights overflow in step 1; without the flag the run skips the steps that follow."""
    log = runs.finish("nan", "--optim.lr", "1e38", "--optim.warmup", "0", "--debug-nans", expect=3)
    assert "nan" in log.splitlines()[-1]
    assert "FloatingPointError" in log or "invalid value (nan) encountered" in log


@pytest.mark.slow
def test_debug_nans_allows_nan_rewards_without_a_reference(grpo_runs):
    """Their terms are NaN by design. Results are bit-identical to those without the flag."""
    grpo_runs.finish("checked", "--steps", "3", "--data.train", "world:0:train:0:20", "--debug-nans")
    assert len(grpo_runs.lines("checked")) == 3

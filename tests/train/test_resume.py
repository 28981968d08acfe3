"""Runs that are killed, stopped or refused: metrics are bit-identical to those of an undisturbed run."""

import json
import random
import signal
import subprocess
import time
from contextlib import suppress

import jax
import numpy as np
import pytest
from train_runs import kill


def assert_same_parameters(runs, name):
    jax.tree.map(np.testing.assert_array_equal, runs.files(name), runs.files("undisturbed"))


def test_undisturbed_run_logs_every_step(runs):
    lines = runs.lines("undisturbed")
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.1
    assert all(line["lost"] == line["skipped"] == 0 for line in lines)
    assert ["heldout_loss" in line for line in lines] == [False, False, True, False, False, True]
    folder = runs.folder / "undisturbed"
    perf = json.loads((folder / "metrics.jsonl").read_text().splitlines()[1])["perf"]
    assert {
        "seconds",
        "tokens_per_second",
        "mfu",
        "padded",
        "input_wait",
        "memory_bytes",
        "compilations",
    } == perf.keys()
    assert 0 < perf["padded"] < 1
    assert perf["memory_bytes"] > 1e8
    samples = [json.loads(line) for line in (folder / "samples" / "6.jsonl").read_text().splitlines()]
    assert samples[0]["reference"] and isinstance(samples[0]["caption"], str)  # noqa: PT018
    assert list((folder / "tensorboard").iterdir())
    assert json.loads((folder / "config.json").read_text())["steps"] == 6


def test_run_that_was_stopped_and_killed_is_bit_identical(runs):
    process = runs.start("disturbed")
    runs.until("disturbed", process, 1)
    assert kill(process, signal.SIGTERM) == 75
    assert len(runs.lines("disturbed")) in range(1, 6)
    saved = [int(path.name) for path in (runs.folder / "disturbed" / "checkpoints").iterdir()]
    assert max(saved) == len(runs.lines("disturbed"))  # it saved where it stopped, whatever checkpoint_every says
    process = runs.start("disturbed")
    runs.until("disturbed", process, 5)
    kill(process)
    with (runs.folder / "disturbed" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lo')  # a line that was cut short
    runs.finish("disturbed")
    assert runs.lines("disturbed") == runs.lines("undisturbed")
    assert runs.compilations("disturbed")[-1] == 0 < runs.compilations("undisturbed")[-1]  # all read from the cache
    assert_same_parameters(runs, "disturbed")
    runs.finish("disturbed")  # finished: nothing is left to do
    assert runs.lines("disturbed") == runs.lines("undisturbed")


def test_resume_with_another_config_or_data_is_refused(runs):
    log = runs.finish("undisturbed", "--batch", "16", "--optim.lr", "1", expect=2)
    assert "begun with another config: batch (8 there, 16 here), optim.lr (0.003 there, 1.0 here)" in log
    assert "Traceback" not in log
    log = runs.finish("undisturbed", "--batches", "16", expect=2)
    assert "did you mean batch?" in log


@pytest.mark.soak
@pytest.mark.parametrize("cached", [True, False])
def test_run_killed_at_random_moments_is_bit_identical(runs, cached):
    """SIGKILL and SIGTERM at random times of a run: in start-up, compilation, loop and saves."""
    kills = 10
    draw, name, done = random.Random(kills + cached), f"killed-{cached}", 0
    start = time.monotonic()
    runs.finish(f"timed-{cached}", cached=cached)
    duration = time.monotonic() - start
    while done < kills:
        process = runs.start(name, cached=cached)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=draw.uniform(0.2, 1.0) * duration)
        if process.poll() is not None:  # it finished before the signal: start another run
            assert process.returncode == 0
            assert runs.lines(name) == runs.lines("undisturbed")
            name = f"{name}+"
            continue
        done += 1
        # 0: SIGTERM came in its last step, and it finished; -15: before the first or behind the last handler
        assert kill(process, signal.SIGTERM if done % 3 == 0 else signal.SIGKILL) in (-9, -15, 75, 0)
    runs.finish(name, cached=cached)
    assert runs.lines(name) == runs.lines("undisturbed")
    assert_same_parameters(runs, name)


def test_steps_compile_nothing(runs):
    """Real batches have the shapes and shardings that were compiled before step 1."""
    assert not runs.compiled_late("undisturbed") & {"step", "batch_totals", "agree"}

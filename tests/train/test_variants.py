"""Other kinds of runs: in a bucket, with adapters, traced, exported."""

import json
import os
import signal
import subprocess
import sys

import gcs
import numpy as np
import pytest
from safetensors.numpy import load_file
from train_runs import kill


def avocado(*arguments, expect=0):
    command = [sys.executable, "-m", "avocado_jax", *map(str, arguments)]
    done = subprocess.run(
        command, env=os.environ | {"JAX_PLATFORMS": "cpu"}, capture_output=True, text=True, check=False
    )
    assert done.returncode == expect, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_run_in_a_bucket_resumes_after_kills(runs, tmp_path, monkeypatch):
    """Refused without the role. With it, killed after three saves and finished with the metrics of a local run."""
    with gcs.proxied_bucket(tmp_path / "root", monkeypatch) as proxy:
        monkeypatch.setattr(runs, "folder", "gs://bucket")
        monkeypatch.setattr(runs, "logs", tmp_path)
        proxy.denied = {"storage.buckets.get"}
        log = runs.finish("refused", expect=2)
        (line,) = [line for line in log.splitlines() if line.startswith("avocado sft:")]
        assert line == (
            "avocado sft: gs://bucket: no storage.buckets.get permission; "
            "grant roles/storage.legacyBucketReader beside roles/storage.objectUser"
        )
        proxy.denied = set()
        process = runs.start("run", "--checkpoint_every", "1")
        run = tmp_path / "root" / "bucket" / "run"
        saved = [run / "checkpoints" / str(step) / "commit_success.txt" for step in (1, 2, 3)]
        while not saved[0].exists():
            assert process.poll() is None
        while saved[0].exists() or not saved[2].exists():  # the third save deletes the first step
            assert process.poll() is None
        kill(process, signal.SIGKILL)
        runs.finish("run")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        avocado("convert", "to-hf", "gs://bucket/run", tmp_path / "exported")
    monkeypatch.undo()
    assert [{key: value for key, value in line.items() if key != "perf"} for line in lines] == runs.lines("undisturbed")
    avocado("convert", "to-hf", runs.folder / "undisturbed", tmp_path / "other")
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("exported", "other"))
    assert one == other


@pytest.mark.slow
def test_adapters_are_trained_traced_and_exported(runs, tmp_path):
    runs.finish("lora", "--train", "lora", "--lora.rank", "4", "--profile", "2,3", "--optim.lr", "0.02")
    lines = runs.lines("lora")
    assert lines[-1]["loss"] < lines[0]["loss"] - 0.05
    assert list((runs.folder / "lora" / "profile").rglob("*.xplane.pb"))
    avocado("convert", "to-hf", runs.folder / "lora", tmp_path / "exported")
    before, after = (
        load_file(folder / "model.safetensors") for folder in (runs.folder / "init", tmp_path / "exported")
    )
    assert before.keys() == after.keys()
    changed = {name for name in before if (before[name] != after[name]).any()}
    assert any("q_proj" in name for name in changed)
    assert not any("embed_tokens" in name or "conv1" in name or "norm" in name for name in changed)
    assert all(np.isfinite(leaf).all() for leaf in after.values())

"""The ablate command: its jobs, dry run, metrics, and resumption after a kill."""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from train_runs import GRPO

from avocado_jax.__main__ import main
from avocado_jax.cli.ablate import _add_means
from avocado_jax.config import load
from avocado_jax.rewards.combine import TERMS
from avocado_jax.rewards.extra import load_terms
from avocado_jax.train.inputs import open_source

ROOT = Path(__file__).parents[2]
PAPER = str(ROOT / "configs" / "grpo_7b.py")
ARMS = ["--arm", "before=init", "--arm", "more=sft", "--arm", "R_L=length", "--arm", "R_L + R_D=length,dialogue:0.5"]


def test_jobs_of_the_papers_arms(capsys):
    options = ["--configs", "--seeds", "2", "--out", "gs://b/out", "--init", "gs://b/sft", "--data.train", "gs://b/d"]
    assert main(["ablate", PAPER, *options]) == 0
    jobs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    named = [(job["arm"], job["seed"]) for job in jobs]
    arms = ["SFT + SFT", "R_D", "R_D + R_C", "R_D + R_C + R_L"]
    assert named == [(arm, seed) for seed in (0, 1) for arm in arms]
    for job in jobs:
        program, stage, path, flag, folder, *fields = shlex.split(job["command"])
        assert (program, path, flag) == ("avocado", PAPER, "--workdir")
        assert stage == ("sft" if job["arm"] == "SFT + SFT" else "grpo")
        config = load(path, fields)
        assert (config.seed, config.init, config.data.train) == (job["seed"], "gs://b/sft", "gs://b/d")
        assert folder.startswith("gs://b/out/")
        if stage == "grpo":
            weights = config.rewards.dialogue, config.rewards.checklist, config.rewards.length
            assert weights == tuple(float(term in job["arm"]) for term in ("R_D", "R_C", "R_L"))
    assert len({shlex.split(job["command"])[4] for job in jobs}) == len(jobs)


def shortness(captions, references):
    """A user's term."""
    return [1 / len(caption) if caption else None for caption in captions]


def test_arm_with_a_users_term(capsys):
    """Arms without a user's term have none, also if the config has one."""
    arms = ["--arm", "R_L=length", "--arm", "mine=length:0.5,host:test_ablate_command:shortness=2"]
    given = ["--rewards.extra", "host:module:other"]
    assert main(["ablate", PAPER, "--configs", "--seeds", "1", "--out", "out", *arms, *given]) == 0
    jobs = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    configs = [load(PAPER, shlex.split(job["command"])[5:]) for job in jobs]
    assert [(config.rewards.length, config.rewards.extra) for config in configs] == [
        (1.0, ()),
        (0.5, ("host:test_ablate_command:shortness=2",)),
    ]


def test_means_of_users_terms_are_logged_in_every_run():
    terms = load_terms(["host:test_ablate_command:shortness"], TERMS)
    config = load(str(ROOT / "configs" / "grpo_world.py"), ["--data.heldout", "world:0:test:1:3"])
    names = open_source(config.data.heldout, config.data)[0].index.ids
    runs = [{"metrics": {"order": 0.5}, "captions": dict(zip(names, texts))} for texts in (("ab", "abcd"), ("ab", ""))]
    _add_means(terms, config, runs)
    assert [run["metrics"] for run in runs] == [{"order": 0.5, "shortness": 0.375}, {"order": 0.5, "shortness": 0.5}]


def test_invalid_input_is_a_one_line_error(capsys, tmp_path):
    out = ["--out", str(tmp_path)]
    for options, why in (
        ([str(ROOT / "configs" / "sft_7b.py"), *out], "ablate takes a GrpoConfig"),
        ([PAPER, *out, "--seeds", "0"], "--seeds is 0"),
        ([PAPER, *out, "--arm", "x=charm"], "'charm' is not one of"),
        ([PAPER, *out, "--arm", "x=host:no_module:f"], "No module named 'no_module'"),
        ([PAPER, *out], "has no known truth"),
        ([PAPER, *out, "--data.heldout", "world:0:test:1:4"], "init: no checkpoint"),
        ([PAPER, *out, "--data.heldout", "world:0:test:1:4", "--init", "no/such"], "no/such: no such folder"),
    ):
        assert main(["ablate", *options]) == 2
        errors = capsys.readouterr().err
        assert why in errors
        assert errors.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.soak  # fourteen runs
def test_killed_ablation_resumes(tmp_path):
    """An ablation of a tiny model, killed within an arm, gives the undisturbed table and repeats no finished arm."""
    script = ROOT / "launch" / "random_checkpoint.py"
    subprocess.run([sys.executable, script, tmp_path / "init", "--size", "tiny"], check=True, capture_output=True)
    config = tmp_path / "small.py"
    config.write_text(GRPO.format(init=str(tmp_path / "init")).replace("steps=5", "steps=3"))
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"), "JAX_PLATFORMS": "cpu"}
    env["XLA_FLAGS"] = "--xla_backend_optimization_level=1"  # and one device

    def start(out):
        command = [sys.executable, "-m", "avocado_jax", "ablate", str(config), "--out", str(tmp_path / out)]
        log = (tmp_path / f"{out}.log").open("a")
        return subprocess.Popen([*command, "--seeds", "2", *ARMS], env=env, stdout=log, stderr=log)

    assert start("whole").wait(timeout=900) == 0
    out = tmp_path / "whole"
    results = json.loads((out / "results.json").read_text())
    assert {name: len(each) for name, each in results["results"].items()} == {
        "before": 1,
        "more": 2,
        "R_L": 2,
        "R_L + R_D": 2,
    }
    bases = {row["arm"]: row.get("over") for row in results["summary"]}
    assert bases == {"before": None, "more": "before", "R_L": "before", "R_L + R_D": "R_L"}
    assert (out / "arms.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")
    heldout = json.loads((out / "r_l_r_d" / "1" / "heldout.json").read_text())
    assert len(heldout["captions"]) == 4
    assert json.loads((out / "r_l_r_d" / "1" / "config.json").read_text())["rewards"]["dialogue"] == 0.5

    process, where = start("killed"), tmp_path / "killed" / "r_l" / "0" / "metrics.jsonl"
    while not (where.exists() and where.read_text().count("\n")):
        assert process.poll() is None, (tmp_path / "killed.log").read_text()[-3000:]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = (tmp_path / "killed" / "before" / "0" / "heldout.json").stat().st_mtime_ns
    assert start("killed").wait(timeout=900) == 0
    assert (tmp_path / "killed" / "before" / "0" / "heldout.json").stat().st_mtime_ns == before
    assert json.loads((tmp_path / "killed" / "results.json").read_text()) == results
    assert (tmp_path / "killed" / "table.md").read_text() == (out / "table.md").read_text()

"""The plan command: on this machine, for TPU slices that are not there, and where a step does not fit."""

import json
import os
import subprocess
import sys

import pytest

from avocado_jax.__main__ import main
from avocado_jax.planning import report
from avocado_jax.planning.collectives import KINDS

TINY = [
    "configs/world_tiny.py",
    "--nominal.model",
    "tiny",
    "--nominal.clip",
    "256,2,1,1",
    "--data.caption_tokens",
    "64",
]
PARTS = ("parameters", "optimizer", "inputs", "temporaries")


def planned(capsys, *args):
    """Exit status and the JSON of a plan of the tiny config."""
    status = main(["plan", *TINY, *args, "--json"])
    return status, json.loads(capsys.readouterr().out)


def test_a_step_of_this_machine(capsys):
    status, told = planned(capsys)
    (step,) = told["steps"]
    assert status == 0
    assert told["fits"]
    assert told["topology"].startswith("cpu")
    assert step["bucket"] == dict(tokens=256, patches=2, windows=1, chunks=1, captions=1, caption=64)
    assert step["hbm_bytes"]["total"] == sum(step["hbm_bytes"][part] for part in PARTS)
    # AdamW has two moments of every parameter, all of which are trained here, and its counters
    assert 0 <= step["hbm_bytes"]["optimizer"] - 2 * step["hbm_bytes"]["parameters"] < 100
    assert set(step["collective_bytes"]) == set(KINDS)
    assert step["seconds"] is None  # nobody knows this machine's ceilings


def test_what_does_not_fit_says_by_how_much(capsys, monkeypatch):
    monkeypatch.setattr(report, "memory_of", lambda device: 2**20)
    assert main(["plan", *TINY]) == 1
    said = capsys.readouterr().out
    assert "does not fit by" in said
    assert "--remat full keeps only the layers' inputs" in said


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--topology", "v5p:3x3"], "--topology v5p:3x3"),
        (["--accumulate", "3"], "batch: 8 rows are not divided by 8 parts of the mesh times accumulate 3"),
        (["--mesh.tensor", "3"], "is not 8 devices"),
        (["--nominal.model", "70b"], "nominal.model: '70b'"),
        (["--nominal.clip", "1,2"], "nominal.clip"),
        (["--no_such", "1"], "no such field"),
    ],
)
def test_mistakes_are_one_line(capsys, args, complaint):
    assert main(["plan", *TINY, *args]) == 2
    said = capsys.readouterr().err
    assert complaint in said
    assert said.count("\n") == 1


def of_slice(*args):
    """A plan for a TPU slice, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "avocado_jax", "plan", *args, "--json"],
        env=dict(os.environ, JAX_PLATFORMS="cpu"),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def check_slice(step):
    assert step["bound"] in ("compute", "hbm", "interconnect")
    assert 0 < step["mfu"] <= 0.65
    assert step["collective_bytes"]["all-gather"] > 0
    assert step["residual_bytes_estimate"] < step["hbm_bytes"]["temporaries"] or step["residual_bytes_estimate"] == 0


def test_a_step_of_a_tpu_slice():
    """With splash attention: heads and rows divided."""
    status, told = of_slice(*TINY, "--topology", "v5e:2x2", "--mesh.tensor", "2", "--dtype", "bfloat16")
    assert (status, told["fits"]) == (0, True)
    assert told["steps"][0]["hbm_limit_bytes"] == 16 * 2**30


@pytest.mark.slow
def test_the_paper_s_step_fits_a_slice():
    status, told = of_slice("configs/sft_7b.py", "--topology", "v5p:4x4x4", "--accumulate", "2")
    assert (status, told["fits"]) == (0, True)
    check_slice(told["steps"][0])

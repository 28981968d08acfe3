"""The plan command: on this machine, for TPU slices, and for steps that do not fit."""

import json
import os
import signal
import subprocess
import sys
import threading

import pytest

from avocado_jax.__main__ import main
from avocado_jax.cli.plan import hosts_line
from avocado_jax.config import load
from avocado_jax.data.plan import Bucket
from avocado_jax.data.rows import Shape
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY as TINY_MODEL
from avocado_jax.planning import report
from avocado_jax.planning.collectives import KINDS
from avocado_jax.planning.program import devices_of, program_of

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
GRPO = [
    "configs/grpo_7b.py",
    *("--nominal.model", "tiny", "--nominal.clip", "256,2,1,1"),
    *("--sampling.tokens", "16", "--data.caption_tokens", "8", "--mesh.tensor", "1", "--split", "1", "--group", "2"),
]


def test_plan_of_a_step_larger_than_this_machine(capsys, monkeypatch):
    """The report of a step, the excess of memory, and advice."""
    monkeypatch.setattr(report, "memory_of", lambda device: 2**20)
    assert main(["plan", *TINY, "--json"]) == 1
    plan = json.loads(capsys.readouterr().out)
    (step,) = plan["steps"]
    assert not plan["fits"]
    assert f"does not fit by {(step['hbm_bytes']['total'] - 2**20) / 2**30:.2f} GiB" in step["advice"]
    assert "--remat full keeps only the layers' inputs" in step["advice"]
    assert plan["topology"].startswith("cpu")
    assert step["bucket"] == dict(tokens=256, patches=2, windows=1, chunks=1, captions=1, caption=64)
    assert step["hbm_bytes"]["total"] == sum(step["hbm_bytes"][part] for part in PARTS)
    # AdamW has two moments of every parameter, all of which are trained here, and its counters
    assert 0 <= step["hbm_bytes"]["optimizer"] - 2 * step["hbm_bytes"]["parameters"] < 100
    assert set(step["collective_bytes"]) == set(KINDS)
    assert step["seconds"] is None  # the ceilings of this machine are unknown
    assert plan["hosts"] == [{"process": 0, "rows": list(range(8))}]


def test_plan_lists_the_rows_of_every_host():
    config = load("configs/world_tiny.py")
    program = program_of(config, TINY_MODEL, Bucket(Shape(256, 2, 1, 1), 64), devices_of("v5p:2x2x2"))
    assert program.hosts == {0: [0, 2, 4, 6], 1: [1, 3, 5, 7]}


def test_rows_of_hosts_are_formatted_in_one_line():
    hosts = [{"process": 0, "rows": [0, 1, 8, 9, 11]}, {"process": 1, "rows": [2, 3, 4, 5, 6]}]
    assert hosts_line(hosts) == "2 hosts load 5 rows each; host 0: 0-1, 8-9, 11"


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (["--topology", "v5p:3x3"], "--topology v5p:3x3: INVALID_ARGUMENT"),
        (["--topology", "v4:2x2x2"], "--topology v4:2x2x2: not of v5e, v5p, v6e"),
        (["--accumulate", "3"], "batch: 8 rows are not divided by 8 parts of the mesh times accumulate 3"),
        (["--mesh.tensor", "3"], "is not 8 devices"),
        (["--nominal.model", "70b"], "nominal.model: '70b'"),
        (["--nominal.clip", "1,2"], "nominal.clip"),
        (["--no_such", "1"], "no such field"),
        (["--workdir", "run"], "--workdir: a plan runs nothing and has no run folder"),
        (["--work_dir=run"], "--work_dir=run: a plan runs nothing and has no run folder"),
        (["--all-shapes", "--search", "2"], "--all-shapes excludes --search and --captions"),
        (["--topology", "v6e:2x2,v5e:2x2"], "--topology v6e:2x2,v5e:2x2: several slices need --search N"),
        (["--search", "-1"], "--search -1: a number of choices to compile, or 0"),
    ],
)
def test_invalid_input_is_a_one_line_error(capsys, args, complaint):
    assert main(["plan", *TINY, *args]) == 2
    err = capsys.readouterr().err
    assert complaint in err
    assert err.count("\n") == 1


def test_ctrl_c_ends_the_compiler(monkeypatch):
    """A thread ends the process at once, since the main thread is in the compiler."""
    ended, statuses = threading.Event(), []

    def compiling(*_):
        os.kill(os.getpid(), signal.SIGINT)
        assert ended.wait(60)
        raise InputError("the process has ended")

    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append(status), ended.set()))
    monkeypatch.setattr("avocado_jax.planning.program.devices_of", compiling)
    assert main(["plan", *TINY]) == 2
    assert statuses == [130]


def plan_on_slice(*args):
    """Exit status and JSON of a plan for a TPU slice, made in a new process."""
    done = subprocess.run(
        [sys.executable, "-m", "avocado_jax", "plan", *args, "--json"],
        env=dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=""),  # libtpu refuses flags that it does not know
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode in (0, 1), done.stderr
    return done.returncode, json.loads(done.stdout)


def test_both_memory_errors_are_parsed():
    gib = 2**30
    whole = "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G hbm."
    parts = "the total memory required for HLO temporaries (28.27G) exceeds available HBM (15.75G)."
    assert report.memory_refused(whole, gib) == (18.5 * gib, 15.75 * gib)
    assert report.memory_refused(parts, gib) == (round(28.27 * gib) + gib, 15.75 * gib)
    assert report.memory_refused("INTERNAL: something else", gib) is None


def check_slice(step):
    assert step["bound"] in ("compute", "hbm", "interconnect")
    assert 0 < step["mfu"] <= 0.65
    assert sum(step["collective_bytes"].values()) > 0  # on v5p the compiler gathers by summing padded parts
    assert 0 < step["residual_bytes_estimate"] < step["hbm_bytes"]["temporaries"]


@pytest.mark.slow
def test_plan_of_a_small_step_on_a_tpu_slice():
    """Four hosts, splash attention, heads and rows sharded."""
    status, plan = plan_on_slice(*TINY, "--topology", "v5e:4x4", "--mesh.tensor", "2", "--dtype", "bfloat16")
    assert (status, plan["fits"]) == (0, True)
    (step,) = plan["steps"]
    assert step["hbm_limit_bytes"] == 16 * 2**30
    assert step["advice"] is None
    assert [host["process"] for host in plan["hosts"]] == [0, 1, 2, 3]
    assert [host["rows"] for host in plan["hosts"]] == [[0, 1], [4, 5], [2, 3], [6, 7]]
    check_slice(step)


@pytest.mark.slow
def test_plan_of_every_grpo_phase_on_a_tpu_slice():
    """With splash attention, sharded heads and rows, and two rows per group, as in configs/grpo_7b.py."""
    status, plan = plan_on_slice(*GRPO, "--topology", "v5e:2x2", "--mesh.tensor", "2", "--split", "2", "--group", "4")
    assert (status, plan["fits"]) == (0, True)
    assert [step["name"] for step in plan["steps"]] == ["encode", "view", "rollout", "score", "update"]
    for step in plan["steps"]:
        assert step["bucket"]["captions"] == 2
        assert step["bound"] in ("compute", "hbm", "interconnect")
        assert (0 < step["mfu"] <= 0.65) == (step["name"] != "view")
        assert sum(step["collective_bytes"].values()) > 0
        assert step["hbm_bytes"]["temporaries"] > 0


@pytest.mark.soak  # compiles for ten minutes
def test_step_of_the_paper_fits_a_slice():
    status, plan = plan_on_slice("configs/sft_7b.py", "--topology", "v5p:4x4x4", "--accumulate", "2")
    assert (status, plan["fits"]) == (0, True)
    check_slice(plan["steps"][0])


@pytest.mark.slow
def test_step_of_the_paper_does_not_fit_small_chips_by_default():
    """The compiler refuses it before code generation."""
    status, plan = plan_on_slice("configs/sft_7b.py", "--topology", "v5e:8x8")
    (step,) = plan["steps"]
    assert (status, plan["fits"]) == (1, False)
    assert step["collective_bytes"] is None
    assert "--remat offload" in step["advice"]

"""The plan command: on this machine, for TPU slices, and for steps that do not fit."""

import json
import os
import signal
import subprocess
import sys
import threading
from dataclasses import replace
from functools import partial

import jax
import pytest

from avocado_jax.__main__ import main
from avocado_jax.cli.plan import hosts_line
from avocado_jax.config import load
from avocado_jax.data.plan import Bucket
from avocado_jax.data.rows import Shape
from avocado_jax.errors import InputError
from avocado_jax.models.config import SEVEN_B
from avocado_jax.models.config import TINY as TINY_MODEL
from avocado_jax.models.thinker import init
from avocado_jax.planning import report, search
from avocado_jax.planning.collectives import KINDS
from avocado_jax.planning.program import devices_of, program_of
from avocado_jax.train.run import model_of
from avocado_jax.train.state import split

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


def test_search_skips_plans_that_cannot_fit(monkeypatch):
    """The first choices save the most activations; with little memory they are skipped."""
    config = load("configs/world_tiny.py", ["--mesh.fsdp", "8", "--nominal.model", "tiny"])
    model = model_of(config, TINY_MODEL)
    bucket = Bucket(Shape(4096, 2, 1, 1), 64)
    tried = search.candidates(config, model, 8)
    assert {(one.mesh.fsdp, one.mesh.tensor) for one in tried} == {(8, 1), (4, 2), (2, 4)}
    assert all(8 % (one.mesh.fsdp * one.accumulate) == 0 for one in tried)
    with pytest.raises(InputError, match="7 rows: no mesh of 8 devices divides them"):
        search.candidates(replace(config, batch=7), model, 8)

    # Captions of a clip use as few rows as the chips allow: the clip is read once per row.
    first = search.candidates(load("configs/grpo_7b.py"), SEVEN_B, 64)[0]
    assert (first.split, first.mesh.fsdp, first.mesh.tensor, first.accumulate) == (2, 16, 4, 1)

    monkeypatch.setattr(search, "report", lambda program, phase: {"name": phase.name, "fits": True})
    found = {}
    for limit in (2**30, 10 * 2**20):
        monkeypatch.setattr(search, "memory_of", lambda device, limit=limit: limit)
        found[limit] = [one.remat for one, _ in search.search(config, model, bucket, jax.devices(), 2)]
    assert found == {2**30: ["dots", "full"], 10 * 2**20: ["full", "offload"]}


def test_plan_has_every_phase_of_grpo(capsys):
    """Each is compiled, and all arrays on the devices count, whether it reads them or not."""
    assert main(["plan", *GRPO, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    steps = {step["name"]: step for step in plan["steps"]}
    assert list(steps) == ["encode", "view", "rollout", "score", "update"]
    model = model_of(load("configs/grpo_7b.py"), TINY_MODEL)
    trained, _ = split(jax.eval_shape(partial(init, model), jax.random.key(0)), "captioner")
    weights = sum(leaf.size for leaf in jax.tree.leaves(trained))
    for name, step in steps.items():
        hbm = step["hbm_bytes"]
        assert step["fits"]
        assert set(step["collective_bytes"]) == set(KINDS)
        assert step["bucket"] == dict(tokens=256, patches=2, windows=1, chunks=1, captions=2, caption=16)
        assert hbm["total"] == sum(size for part, size in hbm.items() if part != "total")
        # Eight devices store shards, and some small leaves replicated: policy, two moments, reference in bf16.
        assert weights * (4 + 8 + 2) / 8 < hbm["parameters"] + hbm["optimizer"] + hbm["reference"]
        assert hbm["optimizer"] == pytest.approx(4 * hbm["reference"], abs=100)
        assert ("encoded" in hbm, "view" in hbm, "captions" in hbm) == {
            "encode": (False, False, False),
            "view": (True, False, False),
            "rollout": (True, True, False),
            "score": (True, False, True),
            "update": (True, False, True),
        }[name]
        assert (step["flops"] > 0) == (name != "view")
        assert (step["residual_bytes_estimate"] > 0) == (name == "update")


def of_slice(*args):
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
    status, plan = of_slice(*TINY, "--topology", "v5e:4x4", "--mesh.tensor", "2", "--dtype", "bfloat16")
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
    status, plan = of_slice(*GRPO, "--topology", "v5e:2x2", "--mesh.tensor", "2", "--split", "2", "--group", "4")
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
    status, plan = of_slice("configs/sft_7b.py", "--topology", "v5p:4x4x4", "--accumulate", "2")
    assert (status, plan["fits"]) == (0, True)
    check_slice(plan["steps"][0])


@pytest.mark.slow
def test_step_of_the_paper_does_not_fit_small_chips_by_default():
    """The compiler refuses it before code generation."""
    status, plan = of_slice("configs/sft_7b.py", "--topology", "v5e:8x8")
    (step,) = plan["steps"]
    assert (status, plan["fits"]) == (1, False)
    assert step["collective_bytes"] is None
    assert "--remat offload" in step["advice"]

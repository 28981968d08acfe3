"""Exit statuses: which failures a launcher retries, and the status of each kind of failure."""

import sys

import google.api_core.exceptions as google
import jax
import jax.numpy as jnp
import pytest
from tiny_run import tiny_run

from avocado_jax.__main__ import main
from avocado_jax.data.storage import StorageError
from avocado_jax.errors import InputError, exit_status
from avocado_jax.parallel import liveness

Runtime = jax.errors.JaxRuntimeError


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (InputError("data: none"), 2),
        (StorageError("gs://b/x: 503"), 1),
        (ConnectionError("lost host 3"), 1),
        (Runtime("UNAVAILABLE: connection reset"), 1),
        (Runtime("DEADLINE_EXCEEDED: barrier"), 1),
        (Runtime("ABORTED: peer"), 1),
        (Runtime("RESOURCE_EXHAUSTED: out of HBM; ABORTED: not the code"), 3),
        (Runtime("INTERNAL: during UNAVAILABLE: of something"), 3),
        (ValueError("UNKNOWN: Gloo all-reduce failed: connection closed by peer"), 3),
        (ValueError("UNAVAILABLE: coordination service"), 1),
        (ValueError("no code: UNAVAILABLE"), 3),
        (google.ServiceUnavailable("503"), 1),
        (google.TooManyRequests("429"), 1),
        (google.RetryError("too long", None), 1),
        (google.Forbidden("403"), 2),
        (google.PreconditionFailed("412"), 3),
        (FloatingPointError("diverged"), 3),
        (MemoryError(), 3),
        (ZeroDivisionError("x"), 3),
        (ImportError("no libtpu"), 3),
    ],
)
def test_exit_status_of_each_error(error, status):
    assert exit_status(error) == status


def raise_out_of_memory():
    jnp.zeros(1 << 46).block_until_ready()  # 256 TiB


def raise_internal_error():
    return {}["missing"]


def test_successful_run_exits_with_0():
    status, storage = tiny_run()
    assert (status, storage.saved, [line["step"] for line in storage.lines]) == (0, [4], [1, 2, 3, 4])


@pytest.mark.parametrize(
    ("fail", "last_line", "traceback"),
    [
        (lambda: tiny_run(skipped_in_row=lambda step: step), "3 steps in a row without a finite gradient", False),
        (raise_out_of_memory, "JaxRuntimeError: RESOURCE_EXHAUSTED: Out of memory allocating", True),
        (raise_internal_error, "KeyError: 'missing'", True),
    ],
    ids=["divergence", "out of memory", "internal error"],
)
def test_permanent_failure_exits_with_3(fail, last_line, traceback, monkeypatch, capsys, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("from avocado_jax.config import SftConfig\nconfig = SftConfig()\n")
    monkeypatch.setattr("avocado_jax.train.run.sft", lambda *_: fail())
    assert main(["sft", str(config), "--workdir", str(tmp_path / "run")]) == 3
    errors = capsys.readouterr().err
    assert errors.splitlines()[-1].startswith(f"avocado sft: {last_line}")
    assert ("Traceback" in errors) == traceback


def test_broken_installation_exits_with_3(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "avocado_jax.cli.sft", None)
    assert main(["sft"]) == 3
    assert "ModuleNotFoundError" in capsys.readouterr().err.splitlines()[-1]


def test_help_lists_exit_statuses(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    assert "  3    failed, and a retry fails in the same way" in capsys.readouterr().out


def test_the_loop_reports_its_progress(monkeypatch):
    stages = []
    monkeypatch.setattr("avocado_jax.train.loop.progress", lambda *stage: stages.append(stage))
    tiny_run(eval_every=2)
    assert stages[:6] == [
        (1, "input"),
        (1, "step"),
        (2, "input"),
        (2, "step"),
        (2, "evaluation"),
        (2, "checkpoint"),
    ]


def test_the_timeouts_of_the_config_are_used(monkeypatch, tmp_path):
    config = tmp_path / "config.py"
    config.write_text("from avocado_jax.config import SftConfig\nconfig = SftConfig()\n")
    monkeypatch.setattr("avocado_jax.train.run.sft", lambda *_: 0)
    given, started = {}, []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **times: given.update(times))
    monkeypatch.setattr(liveness, "start", lambda *times: started.append(times) or liveness.Liveness(60, 0))
    words = [
        "sft",
        str(config),
        "--workdir",
        str(tmp_path),
        "--coordinator",
        "h:1",
        "--processes",
        "2",
        "--process",
        "0",
    ]
    fields = ["--timeouts.start", "70", "--timeouts.heartbeat", "7", "--timeouts.step", "700"]
    assert main([*words, *fields]) == 0
    assert given == {"initialization_timeout": 140, "heartbeat_timeout_seconds": 7}
    assert started[0][:2] == (7, 700)

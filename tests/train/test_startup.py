"""Start-up checks of one host, and the comparison between hosts."""

import json
import subprocess
import sys
from types import SimpleNamespace

import gcs
import pytest

from avocado_jax.config import SftConfig, TimeoutConfig
from avocado_jax.data import storage
from avocado_jax.data.index import COLUMNS, dump_index, load_index
from avocado_jax.data.sources import Shard, Shards
from avocado_jax.errors import InputError
from avocado_jax.parallel.processes import init_distributed
from avocado_jax.train import startup
from avocado_jax.train.startup import REPORT_BYTES, Host, find_problem, gather, ready

GOOD = [Host(f"host-{number}", "code", "config", "", False) for number in range(4)]


def test_hosts_that_agree_may_start():
    assert find_problem(GOOD) is None


@pytest.mark.parametrize(
    ("change", "text", "permanent"),
    [
        (dict(code="other"), "host 2 (host-2) and host 0 (host-0) run different code: install one commit", True),
        (dict(config="other"), "were started with different configs, fields, folders or commits of init", True),
        (dict(error="gs://b/x: no access", permanent=True), "host 2 (host-2): gs://b/x: no access", True),
        (dict(error="gs://b/x: 503", permanent=False), "host 2 (host-2): gs://b/x: 503", False),
    ],
)
def test_all_hosts_report_the_error_of_one(change, text, permanent):
    problem = find_problem([*GOOD[:2], GOOD[2]._replace(**change), GOOD[3]])
    assert text in problem.text
    assert problem.permanent is permanent


def test_longest_error_fits_into_a_report():
    error = startup._short('"\\\n\x00é' * 1000)
    assert gather(Host("h" * 64, "c" * 32, "d" * 32, error, True))[0].error == error
    assert len(json.dumps(Host("h" * 64, "c" * 32, "d" * 32, '"' * 600, True))) < REPORT_BYTES


def test_startup_checks_of_one_host(tmp_path):
    def missing():
        raise InputError("data: none")

    with pytest.raises(InputError, match="data: none"):
        ready(SftConfig(), str(tmp_path / "run"), missing)
    assert not (tmp_path / "run").exists()
    assert ready(SftConfig(), str(tmp_path / "run"), lambda: 5) == 5
    assert not list((tmp_path / "run").iterdir())  # the probe is gone
    (tmp_path / "file").write_text("in the way")
    with pytest.raises((InputError, OSError), match="file"):
        ready(SftConfig(), str(tmp_path / "file" / "run"), lambda: 5)


def test_folder_that_loses_writes_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "read", lambda path: b"something else")
    with pytest.raises(InputError, match="its content differs from what was written"):
        startup.probe(str(tmp_path))


@pytest.mark.parametrize(
    ("permission", "role"),
    [
        ("storage.buckets.get", "roles/storage.legacyBucketReader beside roles/storage.objectUser"),
        ("storage.objects.create", "roles/storage.objectUser"),
        ("storage.objects.get", "roles/storage.objectViewer, or roles/storage.objectUser for the bucket of a run"),
        ("storage.objects.list", "roles/storage.objectViewer, or roles/storage.objectUser for the bucket of a run"),
        ("storage.objects.delete", "roles/storage.objectUser"),
    ],
)
def test_missing_permission_is_named_with_its_role(permission, role, tmp_path, monkeypatch):
    with gcs.proxied_bucket(tmp_path, monkeypatch) as proxy:
        assert ready(SftConfig(), "gs://bucket/run", lambda: 5) == 5
        proxy.denied = {permission}
        with pytest.raises(InputError) as error:
            ready(SftConfig(), "gs://bucket/run", lambda: 5)
    assert str(error.value) == f"gs://bucket: no {permission} permission; grant {role}"


def test_the_code_digest_depends_on_sources_and_versions(tmp_path, monkeypatch):
    (tmp_path / "one.py").write_text("x = 1")
    monkeypatch.setattr(startup, "PACKAGE", tmp_path)
    before = startup.code()
    assert startup.code() == before
    (tmp_path / "one.py").write_text("x = 2")
    assert startup.code() != before
    (tmp_path / "one.py").write_text("x = 1")
    (tmp_path / "two.py").touch()
    assert startup.code() != before
    (tmp_path / "two.py").unlink()
    (tmp_path / "term.py").write_text("x = 1")
    monkeypatch.setattr(startup, "PACKAGE", tmp_path / "one.py")
    monkeypatch.setitem(sys.modules, "users", SimpleNamespace(__file__=str(tmp_path / "term.py")))
    with_module = startup.code(["users", "absent"])
    (tmp_path / "term.py").write_text("x = 2")
    assert startup.code(["users", "absent"]) not in (with_module, startup.code())
    monkeypatch.setattr(startup, "version", lambda name: "0.0")
    assert startup.code() != before


def test_hosts_compare_the_commit_of_init(tmp_path, monkeypatch):
    """Each host resolves a branch of the hub independently."""
    reports = []
    monkeypatch.setattr(startup.jax, "process_count", lambda: 2)
    monkeypatch.setattr(startup, "gather", lambda host: reports.append(host) or [host])
    for commit in ("a", "b", "b"):
        checkpoint = SimpleNamespace(folder=tmp_path / "models--ORG--NAME" / "snapshots" / commit)
        opened = SimpleNamespace(checkpoint=checkpoint)
        assert startup.ready(SftConfig(), str(tmp_path), lambda opened=opened: opened) is opened
    assert reports[0].config != reports[1].config == reports[2].config


def test_missing_or_truncated_shards_are_refused(tmp_path):
    (tmp_path / "one").write_bytes(b"12345")
    (tmp_path / "two").write_bytes(b"123")
    shards = [Shard("one", 1, 5, ""), Shard("two", 1, 3, "")]
    columns = {name: [] for name in ("seconds", *COLUMNS)}
    index = load_index(dump_index([], columns), "byte", "nothing")
    Shards(str(tmp_path), shards, index, None, 1.0).check()
    (tmp_path / "two").write_bytes(b"12")
    with pytest.raises(InputError, match="two: has 2 bytes, where manifest"):
        Shards(str(tmp_path), shards, index, None, 1.0).check()
    (tmp_path / "two").unlink()
    with pytest.raises(InputError, match="two: is missing"):
        Shards(str(tmp_path), shards, index, None, 1.0).check()


def test_number_of_devices_is_checked():
    with init_distributed(None, None, None, 8, TimeoutConfig()):
        pass
    with (
        pytest.raises(InputError, match="--devices 16: 1 processes have 8 together"),
        init_distributed(None, None, None, 16, TimeoutConfig()),
    ):
        pass
    with pytest.raises(InputError, match="go together"), init_distributed("host:1", 2, None, None, TimeoutConfig()):
        pass


def test_timeout_of_a_wait_is_a_one_line_error():
    program = """
from avocado_jax.parallel.processes import deadline
import threading
with deadline(60, "not this one"):
    pass
with deadline(0.01, "host 0: the others have not come"):
    threading.Event().wait()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr) == (75, "host 0: the others have not come (waited 0.01 s)\n")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "complaint"),
    [
        (["--batch", "16"], "were started with different configs, fields, folders or commits of init"),
        (["--data.train", "/nowhere"], "/nowhere/manifest.json: No such file or directory"),
    ],
)
def test_both_hosts_report_the_error_of_the_second(runs, fields, complaint):
    processes = runs.start(f"apart{fields[0]}", processes=2, last=fields)
    assert [process.wait(timeout=400) for process in processes] == [2, 2]
    for number in range(2):
        log = (runs.logs / f"apart{fields[0]}-{number}.log").read_text()
        (line,) = [line for line in log.splitlines() if line.startswith("avocado sft:")]
        assert complaint in line
        assert "host 1 (" in line
        assert "Traceback" not in log

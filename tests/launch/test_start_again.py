"""`start` of each launcher with a failing call of gcloud, kubectl, xpk or SkyPilot: the next `start` finishes."""

import importlib
import io
import json
import os
import re
import shlex
import subprocess
import sys
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import commands
import fake_cloud
import pytest

DATA = "--init gs://bucket/base --data.train gs://bucket/shards --accumulate 2"
JOB = f"--topology v5p:4x4x4 sft configs/sft_7b.py --workdir gs://bucket/run {DATA}"
WHERE = "--name run1 --project my-project --zone us-east5-a"
START = {
    "gcloud": f"start {WHERE} {JOB}",
    "gke": f"start {WHERE} --cluster c1 --image registry/avocado:1 {JOB}",
    "sky": f"start --name run1 {JOB}",
}
LAUNCHES = iter(range(10**9))


@pytest.fixture
def cloud(tmp_path, monkeypatch):
    """`cloud(script, words)` runs a launcher with the fakes; `cloud.state` lists the created resources.

    With `cloud.processes` the programs are those on PATH; otherwise functions are called in their place.
    """
    real = subprocess.run

    def run(command, check=False, cwd=None, **options):
        if command[0] not in fake_cloud.NAMES or made.processes:
            return real(command, check=check, cwd=cwd, **options)
        out, here, code, error = io.StringIO(), os.getcwd(), 0, ""
        os.chdir(cwd or here)
        try:
            with redirect_stdout(out):
                fake_cloud.call(made.path, command[0], command[1:])
        except SystemExit as end:
            code, error = 1, str(end)
        finally:
            os.chdir(here)
        if code and check:
            raise subprocess.CalledProcessError(code, command)
        return subprocess.CompletedProcess(command, code, out.getvalue(), error)

    @contextmanager
    def exported(dry):
        (tmp_path / "tree").mkdir(exist_ok=True)
        yield tmp_path

    for name in ("gcloud", "gke", "sky"):
        monkeypatch.setattr(importlib.import_module(name), "exported_commit", exported)
    monkeypatch.setattr(importlib.import_module("gcloud"), "POLL_SECONDS", 0)
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")

    class Cloud:
        processes = False

        def __call__(self, script, words):
            monkeypatch.setenv("AVOCADO_LAUNCH", f"launch-{next(LAUNCHES)}")  # each start has a unique name
            monkeypatch.setattr(sys, "argv", [script, *shlex.split(words)])
            module = importlib.import_module(script)
            return commands.main(module.parser(), module.verbs)

        def install(self, **state):
            self.path = fake_cloud.install(tmp_path, **state)
            return self

        @property
        def state(self):
            return json.loads(self.path.read_text())

        def change(self, **state):
            self.path.write_text(json.dumps(self.state | state))

    made = Cloud()
    return made.install()


def outcome(state):
    """The resources without launch names. All hosts must have the same name, or they would not read failures."""
    hosts = state["hosts"]
    assert len({host["job"] for host in hosts}) <= 1
    kept = {name: state[name] for name in ("queued", "jobset", "jobs")}
    kept["hosts"] = [{name: host[name] for name in ("code", "setup", "job", "active")} for host in hosts]
    return re.sub(r"launch-\d+", "LAUNCH", json.dumps(kept))


@pytest.mark.parametrize("mode", ["before", "half"])
@pytest.mark.parametrize("script", START)
def test_failed_start_is_finished_by_the_next_start(cloud, script, mode):
    cloud.processes = True
    assert cloud(script, START[script]) == 0
    undisturbed = cloud.state
    cloud.processes = False
    assert undisturbed["creates"] == 1
    failed = 0
    for fail in range(1, undisturbed["calls"] + 1):
        cloud.install(fail=fail, mode=mode)
        status = cloud(script, START[script])
        failed += status != 0
        if status:
            assert status in (1, 2)  # 2: xpk has no manifest
            assert cloud(script, START[script]) == 0
        assert outcome(cloud.state) == outcome(undisturbed), fail
        assert cloud.state["creates"] == 1, fail
    assert failed >= undisturbed["calls"] - 4  # polling survives errors


@pytest.mark.parametrize("script", START)
def test_running_job_is_not_changed(cloud, script, capsys):
    assert cloud(script, START[script]) == 0
    before = cloud.state
    assert cloud(script, START[script]) == 0
    assert cloud.state | {"calls": 0} == before | {"calls": 0}
    assert "run1: " in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize(
    "state", ["ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE", "FAILED", "SUSPENDED"]
)
def test_gcloud_continues_from_every_state(cloud, state):
    host = {"code": "", "setup": "", "job": "", "active": "inactive", "starts": 0}
    queued = {"name": "run1", "state": state, "kind": "v5p-128", "count": 1}
    cloud.install(queued=queued, hosts=[dict(host), dict(host)])
    assert cloud("gcloud", START["gcloud"]) == 0
    assert [host["active"] for host in cloud.state["hosts"]] == ["active"] * 2
    assert cloud.state["creates"] == (state in ("FAILED", "SUSPENDED"))  # they hold no slices: created anew


def test_gcloud_stop_then_start(cloud):
    assert cloud("gcloud", START["gcloud"]) == 0
    first = cloud.state["hosts"][0]["job"]
    assert cloud("gcloud", f"stop {WHERE}") == 0
    assert {host["active"] for host in cloud.state["hosts"]} == {"failed"}
    assert cloud("gcloud", START["gcloud"]) == 0
    assert {host["active"] for host in cloud.state["hosts"]} == {"active"}
    assert cloud.state["hosts"][0]["job"] != first  # another launch ignores earlier failures
    assert cloud.state["creates"] == 1


def test_polling_gives_up_after_many_errors(cloud, monkeypatch, capsys):
    gcloud = importlib.import_module("gcloud")
    polls = []
    monkeypatch.setattr(gcloud, "_find", lambda args: polls.append(1) or subprocess.run(["false"], check=True))
    assert cloud("gcloud", START["gcloud"]) == 1
    assert len(polls) == gcloud.ATTEMPTS
    assert "the same command continues from here" in capsys.readouterr().err


def test_repeatedly_failing_slice_is_not_requested_forever(cloud, monkeypatch, capsys):
    gcloud = importlib.import_module("gcloud")
    monkeypatch.setattr(gcloud, "_find", lambda args: {"state": {"state": "FAILED"}})
    assert cloud("gcloud", START["gcloud"]) == 2
    assert cloud.state["creates"] == 1
    assert "run1 is FAILED" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("script", "old", "new", "complaint"),
    [
        ("gcloud", "4x4x4", "2x4x4", "run1 is 1 x v5p-128, not 1 x v5p-64"),
        ("gke", "4x4x4", "2x4x4", "another topology, command"),
        ("gke", "avocado:1", "avocado:2", "another image"),
        ("gke", "gs://bucket/base", "gs://bucket/other", "another command"),
    ],
)
def test_different_job_with_the_same_name_is_refused(cloud, capsys, script, old, new, complaint):
    assert cloud(script, START[script]) == 0
    assert cloud(script, START[script].replace(old, new).replace("start", "start --unplanned", 1)) == 2
    assert complaint in capsys.readouterr().err
    assert cloud.state["creates"] == 1


@pytest.mark.parametrize("how", ["Completed", "Failed", "deleted"])
def test_gke_replaces_a_jobset_that_has_ended(cloud, how):
    """Also with another topology, on which the run resumes."""
    assert cloud("gke", START["gke"].replace("4x4x4", "2x4x4 --unplanned")) == 0
    jobset = cloud.state["jobset"]
    if how == "deleted":
        jobset["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
    else:
        jobset["status"] = {"conditions": [{"type": "Suspended", "status": "False"}, {"type": how, "status": "True"}]}
    cloud.change(jobset=jobset)
    assert cloud("gke", START["gke"]) == 0
    assert "--devices 64" in json.dumps(cloud.state["jobset"])
    assert cloud.state["creates"] == 2


@pytest.mark.parametrize("status", ["SUCCEEDED", "FAILED", "FAILED_SETUP", "CANCELLED"])
def test_sky_starts_a_job_that_has_ended(cloud, status):
    cloud.install(jobs=[{"job_name": "run1", "status": status}, {"job_name": "other", "status": "RUNNING"}])
    assert cloud("sky", START["sky"]) == 0
    assert cloud.state["creates"] == 1
    cloud.install(jobs=[{"job_name": "run1", "status": "RECOVERING"}])
    assert cloud("sky", START["sky"]) == 0
    assert cloud.state["creates"] == 0


def test_image_contains_only_the_commit(tmp_path, monkeypatch):
    """Untracked files are not included; uncommitted changes are an error."""

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    git("init", "--quiet")
    (tmp_path / "kept.py").write_text("committed")
    git("add", "kept.py")
    git("commit", "--quiet", "--message=one")
    (tmp_path / "private.txt").write_text("not committed")
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    with commands.exported_commit(dry=False) as folder:
        assert [path.name for path in Path(folder, "tree").iterdir()] == ["kept.py"]
        assert Path(folder, "avocado.tar.gz").exists()
    (tmp_path / "kept.py").write_text("changed")
    with pytest.raises(commands.InputError, match="not committed"), commands.exported_commit(dry=False):
        pass

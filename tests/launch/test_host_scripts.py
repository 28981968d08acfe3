"""The scripts on a host (setup.sh, service.sh, read_secrets.py) and the sources of the image."""

import base64
import configparser
import os
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import read_secrets
from requests.exceptions import ConnectionError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def host(tmp_path):
    """`host(script, *words)` runs a script of launch/ and returns the calls of `sudo` and uv; `tee` writes unit."""
    bin_ = tmp_path / "bin"
    (tmp_path / ".uv" / "bin").mkdir(parents=True)
    (tmp_path / "launch").mkdir()
    bin_.mkdir()
    scripts = {
        bin_ / "sudo": f'[ "$1" != tee ] || exec cat >{tmp_path}/unit\necho "$*" >>{tmp_path}/calls',
        tmp_path / ".uv" / "bin" / "uv": f'echo "uv $* $UV_PYTHON_PREFERENCE" >>{tmp_path}/calls',
    }
    for path, text in scripts.items():
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    def run(script, *words):
        shutil.copy(ROOT / "launch" / script, tmp_path / "launch")
        env = os.environ | {"PATH": f"{bin_}:{os.environ['PATH']}", "HOME": str(tmp_path)}
        subprocess.run(["bash", tmp_path / "launch" / script, *words], env=env, check=True)
        return (tmp_path / "calls").read_text().splitlines()

    return run


def test_service_restarts_on_all_statuses_except_0_2_and_3_and_after_reboot(host, tmp_path):
    words = ["printf", "%s\n", "two words", "$HOME", "100%h", '"quoted"']
    assert host("service.sh", *words) == [
        "systemctl daemon-reload",
        "systemctl --quiet enable avocado",
        "systemctl restart avocado",
    ]
    unit = configparser.ConfigParser(interpolation=None)
    unit.optionxform = str
    unit.read(tmp_path / "unit")
    service = unit["Service"]
    assert (service["Restart"], service["RestartPreventExitStatus"]) == ("on-failure", "2 3")
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Install"]["WantedBy"] == "multi-user.target"  # a reboot
    assert service["WorkingDirectory"] == str(tmp_path)
    assert int(service["TimeoutStopSec"]) > 90  # the training loop takes at most 90 to save
    job = tmp_path / "job.sh"
    assert job.stat().st_mode & 0o077 == 0  # it has the values of --env
    program, name = service["ExecStart"].split()
    done = subprocess.run([program, tmp_path / name], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout.splitlines() == words[2:]  # no word is split or expanded


def test_setup_installs_the_extras_with_uv_python(host):
    venv, install = host("setup.sh", "tpu", "wandb")
    assert venv == "uv venv --quiet --allow-existing --python 3.11 .venv only-managed"
    command = "uv pip install --quiet --python .venv/bin/python --requirement requirements.txt"
    assert install == f"{command} --editable .[tpu,wandb] only-managed"


@pytest.fixture
def secret_manager(monkeypatch):
    """`secret_manager(answer)` sets the response of Secret Manager; `secret_manager.urls` lists the requested URLs."""
    monkeypatch.setattr(read_secrets.google.auth, "default", lambda scopes: (None, "project"))
    urls, answers = [], []

    class Session:
        def __init__(self, credentials):
            pass

        def get(self, url, timeout):
            urls.append(url)
            if isinstance(answers[-1], Exception):
                raise answers[-1]
            return answers[-1]

    monkeypatch.setattr(read_secrets, "AuthorizedSession", Session)
    monkeypatch.setenv("AVOCADO_SECRETS", "p/WANDB_API_KEY,p/OTHER_KEY")
    monkeypatch.setenv("WANDB_API_KEY", "")  # restored after the test
    monkeypatch.setenv("OTHER_KEY", "")
    answer = answers.append
    return SimpleNamespace(answer=answer, urls=urls)


def test_command_receives_the_secrets(secret_manager, monkeypatch):
    payload = {"payload": {"data": base64.b64encode(b"the key\n").decode()}}
    secret_manager.answer(SimpleNamespace(status_code=200, json=lambda: payload, raise_for_status=lambda: None))
    executed = []
    monkeypatch.setattr(os, "execvp", lambda name, words: executed.append((words, dict(os.environ))))
    read_secrets.main(["python", "-m", "x"])
    ((words, env),) = executed
    assert words == ["python", "-m", "x"]
    assert env["WANDB_API_KEY"] == env["OTHER_KEY"] == "the key"
    assert secret_manager.urls[1].endswith("/v1/projects/p/secrets/OTHER_KEY/versions/latest:access")


@pytest.mark.parametrize(
    ("answer", "status", "complaint"),
    [
        (SimpleNamespace(status_code=403), 2, "p/WANDB_API_KEY: status 403 of Secret Manager; create it, and grant"),
        (SimpleNamespace(status_code=404), 2, "status 404"),
        (ConnectionError("no network"), 1, "launch: no network"),
    ],
)
def test_unreadable_secret_is_an_error(secret_manager, capsys, answer, status, complaint):
    secret_manager.answer(answer)
    assert read_secrets.main(["true"]) == status
    assert complaint in capsys.readouterr().err


def test_worker_reads_secrets_first(tmp_path):
    """If the job has secrets."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" = -c ] || echo "$@"\n')
    python.chmod(0o755)
    env = os.environ | {"AVOCADO_PYTHON": str(python), "AVOCADO": "avocado"}

    def command(**more):
        words = ["bash", ROOT / "launch" / "worker.sh", "sft", "x"]
        return subprocess.run(words, env=env | more, stdout=subprocess.PIPE, text=True, check=True).stdout.split()

    assert command() == ["-m", "avocado_jax.train.supervisor", "avocado", "sft", "x"]
    assert command(AVOCADO_SECRETS="p/A") == ["launch/read_secrets.py", str(python), *command()]


def test_image_has_the_files_of_the_worker():
    lines = (ROOT / "launch" / "Containerfile").read_text().splitlines()
    copied = {word for line in lines if line.startswith("COPY") for word in line.split()[1:-1]}
    needed = {"avocado_jax", "configs", "launch", "pyproject.toml", "requirements.txt"}
    assert needed <= copied
    assert all((ROOT / name).exists() for name in copied)
    assert any("[$EXTRAS]" in line for line in lines)
    ignored = (ROOT / "launch" / "Containerfile.dockerignore").read_text().split()
    assert {".git", ".venv"} <= {*ignored}
    assert not copied & {*ignored}

"""Make the launcher scripts importable, and run them without their tools."""

import importlib
import shlex
import subprocess
import sys
from pathlib import Path

import make_manifests
import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1] / "launch"), str(HERE)]

import commands  # noqa: E402


@pytest.fixture
def launch(monkeypatch, capsys):
    """`launch(script, words)` returns status, stdout, stderr. xpk returns its recorded output; no other tool runs."""

    def run(command, **_):
        assert command[0] == "xpk", f"ran {command}"
        options = dict(word.split("=", 1) for word in command if "=" in word)
        text = (make_manifests.MANIFESTS / f"gke-{options['--workload']}.yaml").read_text()
        Path(options["--output-manifest-file"]).write_text(text[text.index("apiVersion") :])
        return subprocess.CompletedProcess(command, 0, "", "")

    for name, value in make_manifests.ENV.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(subprocess, "run", run)

    def launched(script, words):
        monkeypatch.setattr(sys, "argv", [script, *shlex.split(words)])
        module = importlib.import_module(script)
        status = commands.main(module.parser(), module.verbs)
        return status, *capsys.readouterr()

    return launched

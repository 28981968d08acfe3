"""A signal ends `caption` at once, also during compilation, after captions for a bucket are sent."""

import os
import signal
import threading

import pytest

from avocado_jax import __main__
from avocado_jax.__main__ import main
from avocado_jax.cli import caption as command
from avocado_jax.data import appended, storage
from avocado_jax.errors import InputError
from avocado_jax.sampling import outputs


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signal_ends_the_compiler_and_keeps_the_captions(tmp_path, capsys, monkeypatch, number, status):
    lines, sent, ended, statuses = appended.RemoteLines("gs://bucket/out.jsonl", 0), [], threading.Event(), []

    def compiling(*_):
        lines.append(b'{"clip": "a.mp4"}\n')
        os.kill(os.getpid(), number)
        assert ended.wait(60)
        raise InputError("the process has ended")

    monkeypatch.setattr(command, "load_captioner", compiling)
    monkeypatch.setattr(outputs, "open_lines", lambda *_: (lines, b""))
    monkeypatch.setattr(storage, "append", lambda path, data, size: sent.append((path, data, size)))
    monkeypatch.setattr(os, "_exit", lambda status: (statuses.append((status, len(sent))), ended.set()))
    (tmp_path / "b.mp4").touch()
    assert main(["caption", str(tmp_path / "b.mp4"), "--out", str(tmp_path / "out.jsonl")]) == 2
    assert statuses == [(status, 1)]
    assert sent == [("gs://bucket/out.jsonl", b'{"clip": "a.mp4"}\n', 0)]
    assert "avocado caption: stopped; the same command resumes\n" in capsys.readouterr().err


def test_ctrl_c_during_imports_prints_one_line(capsys, monkeypatch):
    def importing(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__.importlib, "import_module", importing)
    assert main(["caption", "clip.mp4"]) == 130
    assert capsys.readouterr().err == "avocado caption: stopped\n"

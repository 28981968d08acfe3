"""prepare: clips that are temporarily refused or kill their decoder, and kills of the run."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gcs
import pytest
from hub import hub_server
from prepare_fixtures import contents, job
from stream_fixtures import READING

from avocado_jax.data import storage
from avocado_jax.data.make_shard import Job
from avocado_jax.data.prepare import prepare
from avocado_jax.data.sources import open_shards


def loose_clips(clip_bytes: list[bytes]) -> dict[str, bytes]:
    """A manifest and its four clips as files."""
    rows = [{"id": str(number), "video": f"clips/{number}.mov", "caption": "c"} for number in range(4)]
    files = {f"clips/{number}.mov": data for number, data in enumerate(clip_bytes)}
    return files | {"clips.jsonl": "".join(json.dumps(row) + "\n" for row in rows).encode()}


def test_denied_or_missing_clip_in_a_bucket_is_retried(tmp_path, clip_bytes, monkeypatch, in_process):
    with gcs.proxied_bucket(tmp_path / "storage", monkeypatch) as proxy:
        for name, data in loose_clips(clip_bytes).items():
            storage.write(f"gs://bucket/set/{name}", data)
        wanted = Job("gs://bucket/set/clips.jsonl", str(tmp_path / "out"), shard_records=4, reading=READING)
        proxy.denied, proxy.denied_path = {"storage.objects.get"}, "2.mov"
        storage.delete("gs://bucket/set/clips/3.mov")
        done = prepare(wanted, 1, 0.5)
        assert (done.records, done.complete) == (2, True)
        assert [(reject.id, reject.retry) for reject in done.rejects] == [("2", True), ("3", True)]
        assert "no storage.objects.get permission" in done.rejects[0].reason
        assert done.rejects[1].reason == "no such object or bucket"
        storage.write("gs://bucket/set/clips/3.mov", clip_bytes[3])
        first = (tmp_path / "out" / "shard-00000-00000.array_record").read_bytes()
        proxy.denied, proxy.requests = set(), []
        done = prepare(wanted, 1, 0.5)
        assert (done.records, done.shards, done.rejects) == (4, 2, [])
        assert [path for _, path in proxy.requests if "0.mov" in path or "1.mov" in path] == []
    assert (tmp_path / "out" / "shard-00000-00000.array_record").read_bytes() == first
    source = open_shards(str(tmp_path / "out"), READING)
    assert source.index.ids == ["0", "1", "2", "3"]
    assert (source.index.shard.tolist(), source[2].clip) == ([0, 0, 1, 1], clip_bytes[2])


def test_clip_refused_by_the_hub_is_retried(tmp_path, clip_bytes, monkeypatch, in_process):
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add("ORG/set", loose_clips(clip_bytes), "datasets")
        statuses = {"0.mov": "401", "1.mov": "403", "3.mov": "404"}
        hub.faults = lambda request: statuses.get(request.path.rpartition("/")[2], "")
        wanted = Job("hub:ORG/set", str(tmp_path / "out"), reading=READING)
        done = prepare(wanted, 1, 0.8)
        assert (done.records, [(reject.id, reject.retry) for reject in done.rejects]) == (
            1, [("0", True), ("1", True), ("3", True)]
        )  # fmt: skip
        statuses.clear()
        done = prepare(wanted, 1, 0.8)
        assert (done.records, done.rejects) == (4, [])
    assert open_shards(str(tmp_path / "out"), READING).index.ids == ["2", "0", "1", "3"]


DECODER = """
import multiprocessing, os, signal, sys, time

def hook(event, args):
    if event == "open" and isinstance(multiprocessing.process.current_process(), FORKED):
        if str(args[0]).endswith(".m4v"):
            os.kill(os.getpid(), signal.SIGSEGV)
        if str(args[0]).endswith(".avi"):
            time.sleep(60)

from multiprocessing.context import ForkServerProcess as FORKED
sys.addaudithook(hook)
"""  # a module that each interpreter imports: only processes that decode are forked by a server


def test_clip_that_kills_or_hangs_its_decoder_is_one_reject(tmp_path, clip_bytes, monkeypatch):
    names = ["0.mov", "deadly.m4v", "1.mov", "2.mov", "hangs.avi"]
    for number, name in enumerate(names):
        (tmp_path / name).write_bytes(clip_bytes[number % 4])
    rows = [{"id": name, "video": name, "caption": "c"} for name in names]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "hooks").mkdir()
    (tmp_path / "hooks" / "sitecustomize.py").write_text(DECODER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}/hooks", prepend=os.pathsep)
    wanted = Job(str(tmp_path / "clips.jsonl"), str(tmp_path / "out"), False, None, 3, 5.0, READING)
    done = prepare(wanted, 2, 0.5)
    assert [(reject.id, reject.reason, reject.retry) for reject in done.rejects] == [
        ("deadly.m4v", "the process that read it died (SIGSEGV)", False),
        ("hangs.avi", "took longer than 5 s", True),
    ]
    assert done.complete
    assert open_shards(str(tmp_path / "out"), READING).index.ids == ["0.mov", "1.mov", "2.mov"]


KILLED = """
import os, signal, sys
from pathlib import Path

real, main = os.replace, int(os.environ.setdefault("MAIN_PROCESS", str(os.getpid())))
folder, out, last, count = sys.argv[1:]

def replace(part, path):
    with open(count, "ab", 0) as file:  # one byte for each write of any process
        file.write(b".")
        if file.tell() == int(last):
            os.kill(main, signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
    real(part, path)

os.replace = replace
if __name__ == "__main__":
    from prepare_fixtures import job
    from avocado_jax.data.prepare import prepare
    prepare(job(Path(folder), Path(out)), 2, 0.2)
"""


@pytest.mark.slow
def test_resume_after_a_kill_at_any_write_gives_the_same_bytes(published, tmp_path, in_process):
    """SIGKILL in the main process or a worker while a file is written under its temporary name."""
    script = tmp_path / "run.py"
    script.write_text(KILLED)
    environment = {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path]), "TMPDIR": str(tmp_path)}
    for last in (2, 7, 12, 15, 18):  # of the job, 5 shards, 5 reports, 3 parts, and 4 at the end
        out = tmp_path / str(last)
        command = [sys.executable, str(script), str(published), str(out), str(last), str(tmp_path / f"{last}.count")]
        process = subprocess.Popen(command, env=os.environ | environment, start_new_session=True)
        assert process.wait(120) == -9
        deadline = time.monotonic() + 60
        while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
            assert time.monotonic() < deadline, "workers live on"
            time.sleep(0.05)
        assert not (out / "manifest.json").exists()
        assert list(out.rglob("*.part"))
        assert prepare(job(published, out), 1, 0.2).complete
        assert contents(out) == contents(published / "whole"), last

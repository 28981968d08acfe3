"""Metrics of a run in a bucket of a real storage server; W&B runs; profiles."""

import json
import threading
import time

import gcs
import jax
import pytest

from avocado_jax.data import storage
from avocado_jax.train import metrics
from avocado_jax.train.metrics import Log, ProgressLog, wandb_id
from avocado_jax.train.profile import Profile

RUN = "gs://bucket/run"


def line(step):
    return {"step": step, "loss": 1.0 / step, "perf": {"seconds": 0.1}}


def steps_in_bucket():
    path = f"{RUN}/metrics.jsonl"
    return [json.loads(one)["step"] for one in storage.read(path).splitlines()] if storage.exists(path) else []


def wait_for(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def proxy(tmp_path, monkeypatch):
    with gcs.proxied_bucket(tmp_path, monkeypatch) as proxy:
        yield proxy


def uploads(proxy):
    """Names of the uploads so far; a request of a resumable upload counts too."""
    return [path for method, path in proxy.requests if method == "POST" and "upload" in path]


def test_metrics_reach_the_bucket_without_a_checkpoint(proxy, monkeypatch):
    """Also after a storage outage, which prints a warning and delays no step."""
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.05)
    monkeypatch.setattr(storage, "PATIENCE", 0.2)
    log = Log(RUN, 0, True, "", {})
    log.write(line(1))
    wait_for(lambda: steps_in_bucket() == [1])
    wait_for(lambda: storage.names(f"{RUN}/tensorboard"))
    proxy.faulty, proxy.every, proxy.faults = lambda method, path: method == "POST", 1, ("unavailable",)
    for step in (2, 3):
        begun = time.monotonic()
        log.write(line(step))
        assert time.monotonic() - begun < 0.1
    wait_for(lambda: proxy.hits["unavailable"] > 2)
    time.sleep(0.5)  # longer than the retries: the thread has warned and goes on
    assert steps_in_bucket() == [1]
    with pytest.raises(OSError, match="503"):
        log.flush()  # a checkpoint must not follow
    proxy.faulty = lambda method, path: False
    wait_for(lambda: steps_in_bucket() == [1, 2, 3])
    log.close()
    count = len(uploads(proxy))
    time.sleep(0.2)
    assert len(uploads(proxy)) == count  # the thread has ended


def test_only_changes_and_complete_lines_are_uploaded(proxy, monkeypatch):
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 1000.0)
    log = Log(RUN, 0, False, "", {})
    log.write(line(1))
    log.flush()
    count = len(uploads(proxy))
    log.flush()
    assert len(uploads(proxy)) == count
    with log.path.open("a") as file:
        file.write('{"step": 2, "lo')
    log.flush()
    assert len(uploads(proxy)) > count
    assert steps_in_bucket() == [1]
    log.close()


def test_flush_waits_for_an_older_upload(proxy, monkeypatch):
    """Otherwise the older version could replace the newer one after a checkpoint that relies on it."""
    monkeypatch.setattr(metrics, "UPLOAD_SECONDS", 0.01)
    log, real = Log(RUN, 0, False, "", {}), storage.write
    started, finished = threading.Event(), threading.Event()

    def write(path, data):
        first = not started.is_set()
        started.set()
        if first:
            time.sleep(0.5)
        real(path, data)
        if first:
            finished.set()

    monkeypatch.setattr(storage, "write", write)
    log.write(line(1))
    assert started.wait(20)
    log.write(line(2))
    log.close()
    assert finished.wait(20)
    assert steps_in_bucket() == [1, 2]


def test_resumed_log_continues_after_its_step(proxy):
    log = Log(RUN, 0, False, "", {})
    for step in (1, 2, 3):
        log.write(line(step))
    log.close()
    log = Log(RUN, 2, False, "", {})
    log.write(line(3) | {"again": True})
    log.close()
    assert steps_in_bucket() == [1, 2, 3]
    assert storage.read(f"{RUN}/metrics.jsonl").count(b"again") == 1


def test_wandb_ids_are_derived_from_folders(tmp_path, monkeypatch):
    assert wandb_id("gs://a/run") != wandb_id("gs://b/run")
    assert wandb_id(str(tmp_path / "a" / "run")) != wandb_id(str(tmp_path / "b" / "run"))
    assert wandb_id("gs://a/run/") == wandb_id("gs://a/run")
    monkeypatch.chdir(tmp_path)
    assert wandb_id("run") == wandb_id(str(tmp_path / "run"))
    assert len(wandb_id("run")) == 16
    assert wandb_id("run").isalnum()


@pytest.fixture
def traces(monkeypatch):
    """Calls of jax.profiler; a trace is one file."""
    calls = []

    def start(folder):
        assert "start" not in calls[-1:]
        calls.append("start")
        traces.folder = folder

    def stop():
        assert calls[-1:] == ["start"]
        calls.append("stop")
        storage.write(f"{traces.folder}/plugins/host.xplane.pb", b"trace")

    monkeypatch.setattr(jax.profiler, "start_trace", start)
    monkeypatch.setattr(jax.profiler, "stop_trace", stop)
    return calls


def traced_steps(profile, first, last):
    """The steps of a loop during which a trace is active."""
    found = []
    for number in range(first, last + 1):
        profile.before_step(number)
        found += [number] * (profile._local is not None)
        profile.after_step(number, ())
    return found


def test_profile_window_is_traced_from_any_first_step(traces, tmp_path):
    folder = str(tmp_path / "profile")
    assert traced_steps(Profile((3, 5), folder), 1, 9) == [3, 4, 5]
    assert traced_steps(Profile((3, 5), folder), 5, 9) == [5]  # resumed inside the window
    assert traced_steps(Profile((3, 5), folder), 6, 9) == []
    assert traced_steps(Profile((4,), folder), 1, 9) == [4]
    assert traced_steps(Profile((), folder), 1, 9) == []
    assert traces == ["start", "stop"] * 3


def test_stopped_run_keeps_its_trace_in_the_bucket(traces, proxy, capsys, monkeypatch):
    profile = Profile((3, 5), f"{RUN}/profile")
    assert traced_steps(profile, 1, 4) == [3, 4]
    profile.close()  # SIGTERM
    profile.close()
    assert traces == ["start", "stop"]
    assert storage.read(f"{RUN}/profile/plugins/host.xplane.pb") == b"trace"
    proxy.denied = {"storage.objects.create"}
    assert traced_steps(profile, 5, 5) == [5]
    assert "the profile stays in" in capsys.readouterr().err


def test_remaining_time_excludes_compilation(capsys):
    """The loop calls `write` after each step; here a step takes longer from step 20 on."""
    log = ProgressLog(100, 25)

    def minutes(step, seconds, compilations=3, **more):
        perf = {"seconds": seconds, "tokens_per_second": 1.0, "compilations": compilations}
        log._printed = float("-inf")
        log.write({"step": step, "loss": 1.0, "lr": 1e-3, "perf": perf} | more)
        return capsys.readouterr().err.rpartition(", ")[2].removesuffix(" left\n")

    assert minutes(1, 600.0) == "1 tokens/s\n"  # the first step compiles: no estimate from it
    assert minutes(2, 60.0) == "98 min"
    assert minutes(3, 900.0, compilations=4) == "97 min"
    for step in range(4, 20):
        assert minutes(step, 60.0, 4) == f"{100 - step} min"
    for step in range(20, 25):
        minutes(step, 120.0, 4)
    assert minutes(25, 720.0, 4, heldout_loss=1.0) == f"{75 * 75 / 60 + 3 * (720 - 75) / 60:.0f} min"
    for step in range(26, 50):
        minutes(step, 120.0, 4)
    assert minutes(50, 720.0, 4, heldout_loss=1.0) == f"{50 * 2 + 2 * 10} min"
    assert minutes(99, 1.0, 4) == f"{(19 * 120 + 1) / 20 / 60 + 10:.0f} min"
    assert minutes(100, 1.0, 4) == "1 tokens/s\n"


def test_short_remaining_time_is_in_seconds(capsys):
    log = ProgressLog(5, 0)
    for step in (1, 2):
        perf = {"seconds": 3.0, "tokens_per_second": 1.0, "compilations": 0}
        log._printed = float("-inf")
        log.write({"step": step, "loss": 1.0, "lr": 1e-3, "perf": perf})
    assert capsys.readouterr().err.endswith(", 9 s left\n")

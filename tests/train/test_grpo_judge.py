"""GRPO with a remote judge over real sockets, and outages of the judge."""

import json
import threading
import time
import zlib

import pytest
from chat import ChatServer, chat_server
from test_grpo_runs import rollouts

pytestmark = pytest.mark.slow  # a step has five programs to compile

DOWN = 60.0  # seconds


def verdict(number, request):
    """An arbitrary verdict that depends only on the question."""
    content = json.loads(request["messages"][1]["content"])
    verdicts = {
        key: "yes" if zlib.crc32(f"{content['description']}|{text}".encode()) % 3 else "no"
        for key, text in content["statements"].items()
    }
    return json.dumps(verdicts)


def fields(server, *more):
    return ["--rewards.judge", "remote", "--rewards.judge_model", "any", "--rewards.judge_url", server.url, *more]


@pytest.fixture(scope="module")
def judged(grpo_runs):
    """An undisturbed run, for comparison."""
    with chat_server(verdict) as server:
        grpo_runs.finish("judged", *fields(server))
    lines = grpo_runs.lines("judged")
    assert all(line["reward_checklist_missing"] == 0 < line["reward_checklist_std"] for line in lines)
    return grpo_runs


def assert_same_as_judged(runs, name):
    assert runs.lines(name) == runs.lines("judged")
    assert rollouts(runs, name) == rollouts(runs, "judged")


def test_judge_outage_of_a_minute_changes_nothing(judged):
    at, down = threading.Event(), threading.Event()

    def fault(number, request):
        if number == 40:
            at.set()
        return "reset" if down.is_set() else verdict(number, request)  # connections outlive the server

    first = ChatServer(fault)
    process = judged.start("down", *fields(first))
    assert at.wait(300)
    down.set()
    first.close()
    began = time.monotonic()
    while time.monotonic() - began < DOWN:
        assert process.poll() is None
        time.sleep(0.5)
    before = len(judged.lines("down")) if (judged.folder / "down" / "metrics.jsonl").exists() else 0
    assert before < 5  # it waits
    with chat_server(verdict, first.port):
        assert process.wait(timeout=400) == 0
    assert_same_as_judged(judged, "down")


def test_permanent_judge_outage_stops_the_run_resumably(judged):
    with chat_server(lambda number, request: (503, {}, b"") if number > 60 else verdict(number, request)) as server:
        log = judged.finish("gone", *fields(server, "--rewards.judge_patience", "4"), expect=1)
    assert "keypoints of a step without an answer" in log
    assert "Traceback" not in log
    with chat_server(verdict) as server:
        judged.finish("gone", *fields(server))
    assert_same_as_judged(judged, "gone")


def test_cached_verdicts_are_not_requested_again(judged, tmp_path):
    cache = ["--rewards.judge_cache", str(tmp_path / "answers")]
    with chat_server(verdict) as server:
        judged.finish("cached", *fields(server, *cache))
        requested = len(server.requests)
        assert requested > 0
        judged.finish("again", *fields(server, *cache))
        assert len(server.requests) == requested
    assert_same_as_judged(judged, "cached")
    assert_same_as_judged(judged, "again")


def test_judge_errors_are_reported(judged):
    log = judged.finish("wrong", "--rewards.judge", "oracle", expect=2)
    assert "rewards.judge: 'oracle' is not one of lexical, remote, lm, embedding" in log
    log = judged.finish("wrong", "--rewards.judge", "remote", expect=2)
    assert "rewards.judge_model" in log
    with chat_server(lambda number, request: (401, {}, b"no such key")) as server:
        log = judged.finish("wrong", *fields(server), expect=2)
    assert "401" in log
    assert "Traceback" not in log


def test_a_language_model_judges_with_tensor_parallelism_over_processes(grpo_runs):
    """Each clip is on both processes; one of them judges it, on its own devices."""
    init = grpo_runs.folder / "init"
    judge = ["--rewards.judge", "lm", "--rewards.judge_model", str(init), "--steps", "1", "--data.heldout", ""]
    mesh = ["--mesh.data", "2", "--mesh.fsdp", "1", "--mesh.tensor", "2"]
    grpo_runs.finish("lm", *judge, *mesh, devices=4)
    grpo_runs.finish("lm-two", *judge, "--mesh.data", "1", "--mesh.fsdp", "1", "--mesh.tensor", "4", processes=2)
    one, two = ([json.loads(line) for line in rollouts(grpo_runs, name)[0].splitlines()] for name in ("lm", "lm-two"))
    for first, expected in zip(two, one, strict=True):
        assert first["token_ids"] == expected["token_ids"]
        assert first["rewards"] == pytest.approx(expected["rewards"], abs=1e-4)
    assert len({line["rewards"]["checklist"] for line in one}) > 2

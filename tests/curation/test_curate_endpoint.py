"""`curate` and its endpoint: failures, budgets, restarts and fields of requests."""

import json
import os
import signal
import subprocess
import sys

import pytest
from chat import chat_server
from curate_runs import QUICK, check_truth, curate
from fake_curator import FakeCurator, stage_of

from avocado_jax.cli import curate as command
from avocado_jax.remote import chat as module

pytestmark = pytest.mark.usefixtures("short_pauses")


FAULTS = {  # for the first attempt of a question
    "reset": "reset",
    "cut": "garbage",
    "slow": "hang",
    "429": (429, {"Retry-After": "0"}, b"{}"),
    "500": (500, {}, b"oops"),
    "no answer of the protocol": b"<html>busy</html>",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_transient_faults_only_cost_time(curator, fault, tmp_path, capsys):
    few, known = FakeCurator(curator.truths[:1]), set()

    def broken(number, request):
        question = json.dumps(request["messages"], sort_keys=True)
        if question in known:
            return few(number, request)
        known.add(question)
        return FAULTS[fault]

    late = ["--timeout", "1"] if FAULTS[fault] == "hang" else []
    with chat_server(broken) as server:
        status, counts, manifest, _, _ = curate(capsys, few, tmp_path / "out", server.url, *late)
    assert status == 0
    assert counts["calls"] == len(server.requests) >= 12
    assert late or counts["calls"] == 12
    check_truth(manifest, few.truths, tmp_path / "out")


@pytest.mark.parametrize("fault", ["reset", "hang", (503, {}, b"busy"), (400, {}, b"no"), b"<html>"])
def test_unresponsive_endpoint_ends_the_run(curator, fault, tmp_path, capsys):
    """No clip is rejected for it, and the next run repeats the calls."""
    out = tmp_path / "out"
    with chat_server(lambda *_: fault) as server:
        status, counts, manifest, rejects, errors = curate(
            capsys, curator, out, server.url, "--timeout", "0.3", "--patience", "0.8"
        )
    assert (status, manifest, counts["unanswered"], counts["rejected"]) == (1, [], 3, {})
    assert all(reject["stage"] == "visual" and not reject["final"] for reject in rejects.values())
    assert "curator: " in errors
    with chat_server(curator) as server:
        status, _, manifest, rejects, _ = curate(capsys, curator, out, server.url)
    assert (status, len(manifest), rejects) == (0, 3, {})


def test_consecutive_failures_end_the_run(curator, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "SILENCE", 2)
    with chat_server(lambda *_: (400, {}, b"no")) as server:
        status, counts, _, _, errors = curate(capsys, curator, tmp_path / "out", server.url, "--concurrency", "1")
    assert (status, counts["unanswered"], counts["left"], len(server.requests)) == (1, 2, 1, 2)
    assert "no answer to 2 questions in a row" in errors


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_or_address_is_bad_input(curator, status, tmp_path, capsys):
    with chat_server(lambda *_: (status, {}, b"bad key")) as server:
        ended, _, _, _, errors = curate(capsys, curator, tmp_path / "out", server.url)
    assert ended == 2
    assert errors.strip().splitlines()[-1].startswith("avocado curate: http")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_key_is_sent_to_the_endpoint_only(curator, tmp_path, capsys, monkeypatch):
    """The server echoes the key in errors and answers."""
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    few, stages = FakeCurator(curator.truths[:1]), []

    def leaky(stage, truth, answer, attempt):
        stages.append(stage)
        if len(stages) == 1:
            return 500, {}, b"sk-secret-123"
        return "sk-secret-123" if attempt == 1 else answer

    with chat_server(few.but(leaky)) as server:
        status, _, manifest, _, errors = curate(capsys, few, tmp_path / "out", server.url, "--key", "MY_KEY")
    assert (status, len(manifest)) == (0, 1)
    assert {request["authorization"] for request in server.requests} == {"Bearer sk-secret-123"}
    assert "sk-secret" not in errors + "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert not any("sk-secret" in json.dumps(request["messages"]) for request in server.requests)


def test_call_budget_covers_all_runs(curator, tmp_path, capsys):
    out = tmp_path / "out"
    with chat_server(curator) as server:
        status, counts, manifest, _, errors = curate(
            capsys, curator, out, server.url, "--budget-calls", "8", "--concurrency", "1"
        )
        assert (status, len(server.requests), counts["calls"], counts["left"]) == (3, 8, 8, 2)
        assert len(manifest) == 1
        assert "the budget would be exceeded" in errors
        status, counts, *_ = curate(capsys, curator, out, server.url, "--budget-calls", "8")
        assert (status, len(server.requests), counts["calls"]) == (3, 8, 8)
        status, counts, manifest, _, _ = curate(capsys, curator, out, server.url, "--budget-calls", "18")
        assert (status, len(server.requests), counts["calls"]) == (0, 18, 18)
    check_truth(manifest, curator.truths, out)


def test_calls_without_an_answer_count_in_the_budget(curator, tmp_path, capsys):
    with chat_server(lambda *_: (400, {}, b"no")) as server:
        for _ in range(2):
            _, counts, *_ = curate(capsys, curator, tmp_path / "out", server.url, "--budget-calls", "3")
            assert (counts["calls"], len(server.requests)) == (3, 3)


def test_token_budget_is_kept_and_estimated_by_dry_run(curator, tmp_path, capsys):
    """A run finishes with a budget of the predicted maximum, and stops early with a smaller one."""
    out, spent = tmp_path / "out", []

    def counting(number, request):
        text = json.dumps(curator.answer(stage_of(request), curator.truth_of(request)))
        spent.append(module.estimate(request) - 100)
        message = {"message": {"content": text}}
        return json.dumps({"choices": [message], "usage": {"total_tokens": spent[-1]}}).encode()

    with chat_server(counting) as server:
        _, expected, *_ = curate(capsys, curator, out, server.url, "--dry-run", "--answer-tokens", "600")
        assert (expected["clips"], expected["unreadable"], expected["calls"], expected["calls_at_most"]) == (
            3,
            0,
            18,
            54,
        )
        assert server.requests == []
        assert not out.exists()
        part = ["--answer-tokens", "600", "--concurrency", "1", "--budget-tokens"]
        status, counts, *_ = curate(capsys, curator, out, server.url, *part, str(expected["tokens"] // 2))
        assert status == 3
        assert 0 < counts["tokens"] == sum(spent) <= expected["tokens"] // 2
        status, counts, _, _, _ = curate(capsys, curator, out, server.url, *part, str(expected["tokens_at_most"]))
        assert status == 0
        assert counts["tokens"] == sum(spent) <= expected["tokens_at_most"]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_killed_run_resumes_without_repeated_calls(curator, how, tmp_path, capsys):
    """Only calls in flight at the kill are repeated."""
    out, running = tmp_path / "out", []

    def deadly(number, request):
        if number == 9:
            os.kill(running[0].pid, how)
            running[0].wait()
        return curator(number, request)

    with chat_server(deadly) as server:
        videos = [str(truth["path"]) for truth in curator.truths]
        options = [*videos, "--out", str(out), "--url", server.url, "--model", "m", *QUICK, "--concurrency", "1"]
        running.append(subprocess.Popen([sys.executable, "-m", "avocado_jax", "curate", *options]))
        assert running[0].wait(300) == (75 if how == signal.SIGTERM else -how)
        assert not (out / "manifest.jsonl").exists()
        with (out / "answers.jsonl").open("ab") as file:
            file.write(b'{"key": "half a li')
        status, counts, manifest, _, _ = curate(capsys, curator, out, server.url)
    assert status == 0
    check_truth(manifest, curator.truths, out)
    bodies = [json.dumps(request["messages"], sort_keys=True) for request in server.requests]
    assert len(bodies) == 19
    assert len(set(bodies)) == 18
    assert bodies.count(bodies[9]) == 2  # it was not answered
    assert counts["calls"] == 18


def test_extra_request_fields_are_sent(curator, tmp_path, capsys):
    more = '{"max_tokens": null, "max_completion_tokens": 900, "seed": 1}'
    few = FakeCurator(curator.truths[:1])
    with chat_server(few) as server:
        assert curate(capsys, few, tmp_path / "out", server.url, "--request", more)[0] == 0
    for request in server.requests:
        assert (request["max_completion_tokens"], request["seed"], request["temperature"]) == (900, 1, 0)
        assert "max_tokens" not in request
        assert request["response_format"]["type"] == "json_schema"

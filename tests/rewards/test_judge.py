"""The remote judge against a real server with faults: it never hangs, and missing verdicts are never zero."""

import json
import random
import socket
import threading
import time
from concurrent.futures import CancelledError
from email.utils import formatdate

import numpy as np
import pytest
from chat import HOST, chat, chat_server
from remote_judging import CAPTIONS, KEYPOINTS, TRUTH, UNKNOWN, judge_batch, short_pauses  # noqa: F401

from avocado_jax.errors import InputError
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.checklist import mean_score
from avocado_jax.rewards.judge import RemoteJudge

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_scores_equal_the_answers(monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret-1\n")
    with chat_server() as server:
        scores, judge, _ = judge_batch(server.url, key_variable="MY_KEY", options={"temperature": 0, "seed": 7})
    np.testing.assert_array_equal(scores, TRUTH)
    assert scores.dtype == np.float32
    assert len(server.requests) == 3
    assert dict(judge.counts) == {"calls": 3, "missing": 0}
    for request in server.requests:
        assert request["path"] == "/v1/chat/completions"
        assert request["authorization"] == "Bearer secret-1"
        assert (request["model"], request["temperature"], request["seed"]) == ("judge-1", 0, 7)


def test_no_key_sends_no_authorization_header():
    with chat_server() as server:
        judge_batch(server.url)
    assert {request["authorization"] for request in server.requests} == {None}


def test_no_keypoints_make_no_call():
    with chat_server() as server:
        scores, _, _ = judge_batch(server.url, [], [])
        assert scores.shape == (0, 0)
        scores, _, _ = judge_batch(server.url, ["a", "b"], [[], []])
        assert scores.shape == (2, 0)
    assert server.requests == []


ONCE = {  # a fault of every caption's first request, and what it is counted as
    "reset": ("reset", "passing"),
    "closed": ("cut", "passing"),
    "not http": ("garbage", "passing"),
    "a broken encoding": ((200, {"Content-Encoding": "gzip"}, b"not gzip"), "passing"),
    "500": ((500, {}, b"oops"), "passing"),
    "503 with a page": ((503, {"Content-Type": "text/html"}, b"<html>busy</html>"), "passing"),
    "429": ((429, {}, b"{}"), "passing"),
    "not json": (b"<html>hello</html>", "malformed"),
    "json of something else": (b'{"choices": []}', "malformed"),
    "no text": (chat(None), "malformed"),
    "an endless answer": (b" " * (2**20 + 1), "malformed"),
    "words": ("I think most of them are true.", "malformed"),
    "a list": ('["yes", "no", "yes"]', "malformed"),
    "cut short": ('{"1": "yes", "2": "n', "malformed"),
    "too many": (json.dumps({str(number): "yes" for number in range(1, 9)}), "malformed"),
    "from zero": ('{"0": "yes"}', "malformed"),
    "a number twice": ('{"1": "yes", "1": "no"}', "malformed"),
    "no verdict": ('{"1": "perhaps"}', "malformed"),
    "empty": ("{}", "malformed"),
}


@pytest.mark.parametrize("fault", ONCE)
def test_transient_faults_are_retried(fault):
    what, kind = ONCE[fault]
    known = set()

    def first(number, request):
        question = request["messages"][1]["content"]
        return None if question in known else known.add(question) or what

    with chat_server(first) as server:
        scores, judge, _ = judge_batch(server.url)
    np.testing.assert_array_equal(scores, TRUTH)
    assert dict(judge.counts) == {"calls": 6, kind: 3, "missing": 0}
    assert judge.trouble


@pytest.mark.parametrize("fault", ["reset", "hang", "trickle", "cut", (500, {}, b""), (429, {"Retry-After": "0"}, b"")])
def test_permanent_faults_give_nan_within_patience(fault, capsys):
    with chat_server(lambda *_: fault) as server:
        scores, judge, seconds = judge_batch(server.url, patience=1.0, timeout=0.3)
    np.testing.assert_array_equal(scores, UNKNOWN)
    assert judge.counts["missing"] == 6
    assert judge.counts["late"] == 3
    assert judge.counts["calls"] > 3
    assert seconds < 1.5
    assert judge.trouble.count("given up") == 1
    assert "judge: passing: " in capsys.readouterr().err


def test_batches_started_together_have_consecutive_patience():
    """Batches of one rollout; keypoints and probes of a batch wait at the same time."""
    with (
        chat_server(lambda *_: "hang") as server,
        RemoteJudge(Endpoint(server.url, "judge-1", patience=0.4, timeout=5.0)) as judge,
    ):
        start = time.monotonic()
        waiting = [judge(CAPTIONS, KEYPOINTS), judge(CAPTIONS[::-1], KEYPOINTS), judge.probes([""], [[]])]
        seconds = [(wait(), time.monotonic() - start)[1] for wait in waiting]
        assert 0.4 <= seconds[0] < 0.75 <= seconds[1] < 1.2
        start = time.monotonic()
        judge(CAPTIONS, KEYPOINTS[::-1])()  # the batches before it are complete
        assert time.monotonic() - start < 0.75


@pytest.mark.parametrize("fault", [b"nonsense", "nonsense", '{"7": "yes"}', "{}"])
def test_invalid_answers_give_nan_after_a_few_tries(fault):
    with chat_server(lambda *_: fault) as server:
        scores, judge, _ = judge_batch(server.url, tries=2)
    np.testing.assert_array_equal(scores, UNKNOWN)
    assert dict(judge.counts) == {"calls": 6, "malformed": 6, "missing": 6}


def test_partial_answers_are_completed_by_further_calls():
    """Only missing verdicts are requested again, and they are put at their positions."""

    def half(number, request):
        statements = json.loads(request["messages"][1]["content"])["statements"]
        return '{"1": "no", "3": true}' if len(statements) == 4 else None

    with chat_server(half) as server:
        scores, judge, _ = judge_batch(server.url, ["a b"], [["a", "b", "c", "a b"]])
    np.testing.assert_array_equal(scores, [[0, 1, 1, 1]])
    again = json.loads(server.requests[1]["messages"][1]["content"])["statements"]
    assert again == {"1": "b", "2": "a b"}
    assert judge.counts["malformed"] == 1


def test_nan_verdicts_are_excluded_from_the_mean():
    """Two of four keypoints never get a verdict: R_C is the mean of the other two."""

    def silent(number, request):
        statements = json.loads(request["messages"][1]["content"])["statements"]
        return json.dumps({number: "yes" if text == "dog" else "no" for number, text in statements.items() if text})

    with chat_server(silent) as server:
        scores, _, _ = judge_batch(server.url, ["a dog", "a cat"], [["dog", "", "cat", ""], ["", ""]])
    assert mean_score(scores[0], np.int32(4)) == 0.5
    assert np.isnan(mean_score(scores[1], np.int32(2)))  # no answer at all: there is no R_C, rather than none


@pytest.mark.parametrize("header", ["1", "date"])
def test_retry_after_is_respected(header):
    times = []

    def busy(number, request):
        times.append(time.monotonic())
        after = formatdate(time.time() + 2, usegmt=True) if header == "date" else header  # dates have whole seconds
        return (429, {"Retry-After": after}, b"") if number == 0 else None

    with chat_server(busy) as server:
        scores, _, _ = judge_batch(server.url, ["a dog"], [["a dog"]])
    np.testing.assert_array_equal(scores, [[1]])
    assert times[1] - times[0] > 0.95


def test_retry_after_beyond_patience_gives_up_at_once():
    with chat_server(lambda *_: (429, {"Retry-After": "3600"}, b"")) as server:
        scores, judge, seconds = judge_batch(server.url, patience=10.0)
    np.testing.assert_array_equal(scores, UNKNOWN)
    assert judge.counts["late"] == 3
    assert seconds < 3


@pytest.mark.parametrize("status", [400, 413, 422, 302])
def test_refusals_are_not_retried(status):
    """One caption is refused; the others have their scores."""

    def refuse(number, request):
        return (status, {"Location": "/v2"}, b"no") if "dog barks" in request["messages"][1]["content"] else None

    with chat_server(refuse) as server:
        scores, judge, _ = judge_batch(server.url)
    np.testing.assert_array_equal(scores, np.concatenate([UNKNOWN[:1], TRUTH[1:]]))
    assert dict(judge.counts) == {"calls": 3, "refused": 1, "missing": 3}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_wrong_key_model_or_address_raises_input_error(status, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-2")
    with (
        chat_server(lambda *_: (status, {}, b"bad\nkey secret-2")) as server,
        pytest.raises(InputError, match=f"chat/completions: {status} .*: bad key [*]{{3}}$"),
    ):
        judge_batch(server.url)


def test_key_that_expires_later_gives_nan():
    with (
        chat_server(lambda number, _: (401, {}, b"expired") if number else None) as server,
        RemoteJudge(Endpoint(server.url, "judge-1")) as judge,
    ):
        np.testing.assert_array_equal(judge(["a dog"], [["a dog"]])(), [[1]])
        np.testing.assert_array_equal(judge(["a cat"], [["a cat"]])(), [[np.nan]])
        assert judge.counts["refused"] == 1
        assert "expired" in judge.trouble


@pytest.mark.parametrize("url", ["localhost:8000/v1", "ftp://x/v1", "http://", ""])
def test_invalid_urls_are_refused(url):
    with pytest.raises(InputError, match="judge's URL"):
        RemoteJudge(Endpoint(url, "judge-1"))


def test_calls_are_counted_against_the_budget():
    with chat_server() as server:
        captions = [f"caption {number} of a dog" for number in range(10)]
        scores, judge, _ = judge_batch(server.url, captions, [["a dog"]] * 10, max_calls=4)
    assert np.nansum(scores) == 4
    assert np.isnan(scores).sum() == 6
    assert len(server.requests) == 4
    assert judge.counts["refused"] == 6
    assert "budget of 4 calls" in judge.trouble


def test_concurrency_is_bounded_and_answers_keep_their_order():
    with chat_server(lambda *_: time.sleep(0.02)) as server:
        captions = [f"clip {number}." for number in range(40)]
        keypoints = [[f"clip {other}." for other in range(number - 1, number + 2)] for number in range(40)]
        scores, _, _ = judge_batch(server.url, captions, keypoints, concurrency=5)
    np.testing.assert_array_equal(scores, [[0, 1, 0]] * 40)
    assert 2 <= server.most <= 5


def test_batch_runs_in_the_background():
    gate = threading.Event()
    with (
        chat_server(lambda *_: gate.wait(10) and None) as server,
        RemoteJudge(Endpoint(server.url, "judge-1")) as judge,
    ):
        first, second = judge(CAPTIONS, KEYPOINTS), judge(["a cat"], [["a cat"]])
        deadline = time.monotonic() + 10
        while server.now < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert server.now == 4  # both batches are with the server, and this thread is free
        gate.set()
        np.testing.assert_array_equal(second(), [[1]])
        np.testing.assert_array_equal(first(), TRUTH)


def test_outage_delays_but_corrupts_nothing():
    """No server runs when the batch starts; later one starts, fails for a while and then recovers."""
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        port = taken.getsockname()[1]
    captions = [f"clip {number}." for number in range(12)]
    keypoints = [[f"clip {number}.", f"clip {number + 1}."] for number in range(12)]
    with RemoteJudge(Endpoint(f"http://{HOST}:{port}/v1", "judge-1", timeout=2.0)) as judge:
        scores = judge(captions, keypoints)
        time.sleep(0.5)
        assert judge.counts["passing"] > 0
        faults = ["reset", (503, {}, b""), "cut", "nonsense"]
        with chat_server(lambda number, _: faults[number] if number < len(faults) else None, port):
            np.testing.assert_array_equal(scores(), [[1, 0]] * 12)


def test_any_mixture_of_faults_never_gives_wrong_verdicts():
    rng, lock = random.Random(0), threading.Lock()
    faults = ["reset", "hang", "cut", "trickle", "garbage", *(what for what, _ in ONCE.values() if what != "cut")]

    def chaos(number, request):
        with lock:
            return rng.choice(faults) if rng.random() < 0.5 else None

    captions = [f"clip {number}. dog" for number in range(40)]
    keypoints = [[f"clip {number}.", f"clip {number + 1}.", "dog", "cat"] for number in range(40)]
    with chat_server(chaos) as server:
        scores, judge, _ = judge_batch(server.url, captions, keypoints, timeout=0.3)
    known = ~np.isnan(scores)
    np.testing.assert_array_equal(scores[known], np.tile([1, 0, 1, 0], (40, 1))[known])
    assert known.all(axis=1).mean() > 0.8
    assert judge.counts["missing"] == (~known).sum()
    assert min(judge.counts["passing"], judge.counts["malformed"]) > 3


def test_close_cancels_calls_in_flight():
    with chat_server(lambda *_: "hang") as server:
        judge = RemoteJudge(Endpoint(server.url, "judge-1"))
        pending = judge(CAPTIONS, KEYPOINTS)
        deadline = time.monotonic() + 10
        while server.now < 3 and time.monotonic() < deadline:
            time.sleep(0.01)
        start = time.monotonic()
        judge.close()
        assert time.monotonic() - start < 2
        with pytest.raises(CancelledError):  # there are no scores to be had
            pending()

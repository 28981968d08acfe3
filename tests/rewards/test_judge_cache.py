"""The cache of the remote judge: each answer is requested once; a damaged file costs a call, not a wrong score."""

import json
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from chat import chat_server
from remote_judging import CAPTIONS, KEYPOINTS, TRUTH, judge_batch, short_pauses  # noqa: F401

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_partial_answers_are_cached_and_reused(tmp_path):
    def never_the_first(number, request):
        statements = json.loads(request["messages"][1]["content"])["statements"]
        return json.dumps({number: "yes" for number in statements if number != "1"})

    with chat_server(never_the_first) as server:
        scores, _, _ = judge_batch(server.url, ["x"], [["p", "q", "r"]], cache=tmp_path)
    np.testing.assert_array_equal(scores, [[np.nan, 1, 1]])
    with chat_server() as server:  # cached answers are kept, and only the others are requested
        scores, _, _ = judge_batch(server.url, ["x"], [["p", "q", "r"]], cache=tmp_path)
    np.testing.assert_array_equal(scores, [[0, 1, 1]])
    assert json.loads(server.requests[0]["messages"][1]["content"])["statements"] == {"1": "p"}


def test_cached_answers_are_not_requested_again(tmp_path):
    with chat_server() as server:
        judge_batch(server.url, cache=tmp_path)
        scores, judge, _ = judge_batch(server.url, cache=tmp_path)
        np.testing.assert_array_equal(scores, TRUTH)
        assert len(server.requests) == 3
        assert dict(judge.counts) == {"cached": 3, "missing": 0}
        # All that decides an answer is part of the question.
        judge_batch(server.url, cache=tmp_path, options={"temperature": 1})
        assert len(server.requests) == 6
        judge_batch(server.url, ["a cat"], [["cat", "a dog"]], cache=tmp_path)
        assert len(server.requests) == 7
    assert not list(tmp_path.rglob("*.part"))


def test_equal_questions_share_one_call():
    with chat_server(lambda *_: time.sleep(0.1)) as server:
        scores, _, _ = judge_batch(server.url, ["a dog"] * 8, [["a dog", "x"]] * 8)
    np.testing.assert_array_equal(scores, [[1, 0]] * 8)
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b'{"answer": "{',
        b"[]",
        b'{"answer": 1}',
        b'{"answer": "{\\"9\\": \\"yes\\"}"}',
        b'{"verdicts": [true]}',
        b"\xff",
    ],
)
def test_damaged_cache_files_are_ignored(tmp_path, damage):
    with chat_server() as server:
        judge_batch(server.url, CAPTIONS[:1], KEYPOINTS[:1], cache=tmp_path)
        (file,) = tmp_path.rglob("*.json")
        file.write_bytes(damage)
        scores, _, _ = judge_batch(server.url, CAPTIONS[:1], KEYPOINTS[:1], cache=tmp_path)
        np.testing.assert_array_equal(scores, TRUTH[:1])
        assert len(server.requests) == 2
        judge_batch(server.url, CAPTIONS[:1], KEYPOINTS[:1], cache=tmp_path)  # and made good
        assert len(server.requests) == 2


def test_failures_are_not_cached(tmp_path):
    with chat_server(lambda *_: (500, {}, b"")) as server:
        judge_batch(server.url, cache=tmp_path, patience=0.3)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_unwritable_cache_loses_no_answer(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with chat_server() as server:
        scores, judge, _ = judge_batch(server.url, cache=tmp_path / "file")
    np.testing.assert_array_equal(scores, TRUTH)
    assert judge.counts["not cached"] == 3


def test_processes_share_a_cache(tmp_path):
    """Four processes send equal questions at once: verdicts are true, cache files intact, a fifth makes no calls."""
    program = f"""
import sys
from avocado_jax.rewards.checklist import mean_score
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.judge import RemoteJudge
from pathlib import Path
with RemoteJudge(Endpoint(sys.argv[1], "judge-1", cache=Path({str(tmp_path)!r}))) as judge:
    scores = judge([f"clip {{n}}" for n in range(30)], [[f"clip {{n}}", "x"] for n in range(30)])()
    assert (scores == [[1, 0]] * 30).all(), scores
    print(judge.counts["calls"])
"""
    with chat_server() as server:
        running = [
            subprocess.Popen([sys.executable, "-c", program, server.url], stdout=subprocess.PIPE, env=dict(os.environ))
            for _ in range(4)
        ]
        assert all(process.wait(60) == 0 for process in running)
        assert len(server.requests) == sum(int(process.stdout.read()) for process in running)
        last = subprocess.run([sys.executable, "-c", program, server.url], capture_output=True, timeout=60, check=True)
    assert int(last.stdout) == 0
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 30
    kept = [json.loads(path.read_text()) for path in files]
    assert all(json.loads(one["answer"]) == {"1": "yes", "2": "no"} for one in kept)

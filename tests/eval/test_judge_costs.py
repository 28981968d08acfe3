"""Costs of a judge, over real sockets: budgets over restarts, dry runs, the circuit breaker, proxies."""

import json

import pytest
from benchmark_judge import CAPTIONS, honest_answer, write_official
from chat import chat_server

from avocado_jax.__main__ import main
from avocado_jax.cli import evaluate_benchmark
from avocado_jax.eval import public
from avocado_jax.remote import chat as client
from avocado_jax.remote.call import proxy_for


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(client, "LAST_PAUSE", 0.1)
    monkeypatch.setattr(public, "dialogue_scores", lambda captions, references: [None] * len(captions))
    for name in ("OPENAI_API_KEY", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)


def answer(number, request):
    """An honest answer of 100 tokens, by a model with another name."""
    reply = {
        "choices": [{"message": {"content": honest_answer(request)}}],
        "usage": {"total_tokens": 100},
        "model": "m-2026",
    }
    return json.dumps(reply).encode()


@pytest.fixture
def evaluate(tmp_path, capsys):
    """Run the command on ten questions. Returns the exit status, the printed JSON and stderr."""
    captions_file = tmp_path / "mine.jsonl"
    captions_file.write_text(
        "".join(json.dumps({"id": clip, "caption": text}) + "\n" for clip, text in CAPTIONS.items())
    )
    data = str(write_official("worldsense", tmp_path))

    def run(url, *more):
        command = [
            "evaluate",
            "worldsense",
            "--data",
            data,
            "--captions",
            str(captions_file),
            "--out",
            str(tmp_path / "out"),
        ]
        status = main([*command, "--judge", url, "--judge-model", "m", "--json", *map(str, more)])
        captured = capsys.readouterr()
        return status, json.loads(captured.out) if captured.out else None, captured.err

    return run


def test_call_budget_covers_all_runs(evaluate, tmp_path):
    with chat_server(answer) as server:
        for _ in range(2):
            status, result, errors = evaluate(server.url, "--budget-calls", 6)
            assert (status, result, len(server.requests)) == (3, None, 6)
            assert "the budget of 6 calls is spent; answers are kept, the same command continues" in errors
            assert not (tmp_path / "out" / "result.json").exists()
        status, result, _ = evaluate(server.url, "--budget-calls", 10)
        assert (status, result["metrics"]["accuracy"], len(server.requests)) == (0, 100, 10)
        assert evaluate(server.url, "--budget-calls", 0)[0] == 0  # all answers are cached: no call


def test_token_budget_covers_all_runs(evaluate, tmp_path):
    """Estimates of calls in flight do not end the run early, and the endpoint's counts are recorded."""
    limit = ["--request", '{"max_tokens": 20}']
    with chat_server(answer) as server:
        status, result, errors = evaluate(server.url, "--budget-tokens", 750, *limit)
        assert status == 3
        first = len(server.requests)
        assert 3 <= first <= 7
        assert f"the budget of 750 tokens: {100 * first} are spent" in errors
        status, _, _ = evaluate(server.url, "--budget-tokens", 750, *limit)
        assert (status, len(server.requests)) == (3, first)
        status, result, _ = evaluate(server.url, "--budget-tokens", 2000, *limit)
    assert (status, result["missing"], len(server.requests)) == (0, 0, 10)
    lines = [json.loads(line) for line in (tmp_path / "out" / "spent.jsonl").read_text().splitlines()]
    assert [sum(column) for column in zip(*lines)] == [10, 1000]


def test_calls_are_recorded_before_they_are_made(evaluate, tmp_path):
    """A call that was interrupted by a kill counts."""
    ledger_counts = []

    def look(number, request):
        ledger_counts.append((tmp_path / "out" / "spent.jsonl").read_text().count("[1, "))
        return answer(number, request)

    with chat_server(look) as server:
        assert evaluate(server.url)[0] == 0
    assert all(count > number for number, count in enumerate(ledger_counts))
    with (tmp_path / "out" / "spent.jsonl").open("ab") as file:
        file.write(b"[1, 50")  # half a line
    with chat_server(answer) as server:
        assert evaluate(server.url, "--budget-calls", 10)[0] == 0
        assert not server.requests
    (tmp_path / "out" / "spent.jsonl").write_text('{"other": 1}\n')
    status, _, errors = evaluate("http://127.0.0.1:9/v1")
    assert status == 2
    assert "spent.jsonl:1: not a line of calls and tokens" in errors


def test_dry_run_counts_calls_without_requests_or_files(evaluate, tmp_path):
    before = sorted(tmp_path.iterdir())
    with chat_server(answer) as server:
        status, counts, _ = evaluate(server.url, "--dry-run")
        assert (status, len(server.requests), sorted(tmp_path.iterdir())) == (0, 0, before)
        assert (counts["clips"], counts["calls"], counts["cached"], counts["calls_at_most"]) == (3, 10, 0, 30)
        assert evaluate(server.url, "--rounds", "2", "--dry-run")[1]["calls"] == 20
        assert evaluate(server.url)[0] == 0
        assert counts["tokens"] == sum(map(client.estimate, server.requests))
        assert evaluate(server.url, "--dry-run")[1]["calls"] == 0


@pytest.mark.parametrize(("name", "calls"), [("vdc", 20), ("dream-1k", 9), ("probes", 3), ("video-salmonn-2", 21)])
def test_dry_run_counts_follow_up_questions(name, calls, tmp_path, capsys):
    captions_file = tmp_path / "mine.jsonl"
    captions_file.write_text(
        "".join(json.dumps({"id": clip, "caption": text}) + "\n" for clip, text in CAPTIONS.items())
    )
    data = str(write_official(name, tmp_path))
    command = ["evaluate", name, "--data", data, "--judge", "http://127.0.0.1:9/v1", "--judge-model", "m", "--json"]
    assert main([*command, "--captions", str(captions_file), "--dry-run"]) == 0
    given = json.loads(capsys.readouterr().out)
    assert given["calls"] == calls
    assert main([*command, "--dry-run", "--max-new-tokens", "500"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens"] > given["tokens"]


def test_many_consecutive_unanswered_questions_stop_the_run(evaluate, monkeypatch):
    monkeypatch.setattr(evaluate_benchmark, "SILENCE", 4)
    down = [True]
    patience = ["--judge-patience", "0.3"]
    with chat_server(lambda number, request: (503, {}, b"") if down[0] else answer(number, request)) as server:
        status, result, errors = evaluate(server.url, *patience)
        assert (status, result) == (75, None)
        assert "no answer to 4 questions in a row" in errors
        down[0] = False
        assert evaluate(server.url)[1]["missing"] == 0


def test_unparsable_answers_do_not_stop_the_run(evaluate, monkeypatch):
    """They show that the endpoint is available."""
    monkeypatch.setattr(evaluate_benchmark, "SILENCE", 2)
    with chat_server(lambda *_: "I would rather not.") as server:
        status, result, _ = evaluate(server.url)
    assert (status, result["missing"]) == (1, 10)


def test_result_records_request_fields_model_and_digests(evaluate, tmp_path):
    out = tmp_path / "out"
    with chat_server(answer) as server:
        refusing = ["--request", '{"temperature": null, "reasoning_effort": "low"}']
        _, result, _ = evaluate(server.url, *refusing)
        assert all("temperature" not in request for request in server.requests)
        assert {request["reasoning_effort"] for request in server.requests} == {"low"}
        again = evaluate(server.url, *refusing)[1]
        plain = evaluate(server.url)[1]
        assert {request.get("temperature") for request in server.requests[10:]} == {0}
    assert result["judge"]["request"] == {"reasoning_effort": "low"}
    assert result["judge"]["returned"] == again["judge"]["returned"] == {"m-2026": 10}
    assert plain["judge"]["request"] == {"temperature": 0}
    assert "models of the answers, as the endpoint named them: m-2026 (10)" in (out / "table.md").read_text()
    (digest,) = plain["judge"]["digests"].values()
    assert len(digest) == 16
    assert result["judge"]["digests"] == plain["judge"]["digests"]


def test_custom_prompt_changes_the_digest_and_drops_response_format(evaluate, tmp_path):
    folder = tmp_path / "prompts"
    folder.mkdir()
    (folder / "multiple-choice.md").write_text("Say the letter only.\n---\n{{material}}")
    with chat_server(lambda *_: "A") as server:
        result = evaluate(server.url, "--prompts", folder)[1]
        assert not any("response_format" in request for request in server.requests)
    assert (result["metrics"]["accuracy"], result["missing"]) == (100, 0)
    with chat_server(answer) as server:
        assert evaluate(server.url)[1]["judge"]["digests"] != result["judge"]["digests"]


def test_proxy_of_the_environment_is_used(evaluate, monkeypatch):
    """The judge's host does not exist; the proxy answers for it. NO_PROXY and loopback addresses bypass it."""
    with chat_server(answer) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        status, result, _ = evaluate("http://judge.invalid/v1")
        assert (status, result["metrics"]["accuracy"]) == (0, 100)
        assert {request["path"] for request in proxy.requests} == {"http://judge.invalid/v1/chat/completions"}
        monkeypatch.setenv("no_proxy", "judge.invalid")
        assert proxy_for("http://judge.invalid/v1") is None
        with chat_server(answer) as server:
            requested = len(proxy.requests)
            evaluate(server.url, "--request", '{"seed": 1}')
            assert (len(proxy.requests), len(server.requests)) == (requested, 10)


def test_api_key_takes_precedence_over_netrc(evaluate, monkeypatch, tmp_path):
    (tmp_path / "netrc").write_text("machine judge.invalid login someone password else\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("OPENAI_API_KEY", "secret-1")
    with chat_server(answer) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
        assert evaluate("http://judge.invalid/v1")[0] == 0
    assert {request["authorization"] for request in proxy.requests} == {"Bearer secret-1"}

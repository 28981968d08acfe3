"""The public benchmarks, from official files to metrics, with an exact judge over real sockets."""

import json
import re
import threading

import pytest
from benchmark_judge import CAPTIONS, CLIPS, EVENTS, honest_answer, official_content, write_official
from chat import chat_server

from avocado_jax.__main__ import main
from avocado_jax.eval import public
from avocado_jax.eval.benchmarks import BENCHMARKS
from avocado_jax.eval.published import PUBLISHED

EVERY = tuple(BENCHMARKS)


@pytest.fixture(autouse=True)
def _without(monkeypatch):
    """Remove API keys of the environment, and Dlg.F1, which takes seconds to compile and has a separate test."""
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(public, "dialogue_scores", lambda captions, references: [None] * len(captions))


def captions(tmp_path, texts=CAPTIONS, name="mine"):
    path = tmp_path / f"{name}.jsonl"
    path.write_text(
        "".join(json.dumps({"id": clip, "caption": text, "tokens": 7}) + "\n" for clip, text in texts.items())
    )
    return path


def evaluate(capsys, tmp_path, name, texts=CAPTIONS, *more, status=0, fault=lambda number, request: None):
    """Run the command. Returns the result and the judge's server."""
    capsys.readouterr()
    with chat_server(lambda number, request: fault(number, request) or honest_answer(request)) as server:
        command = ["evaluate", name, "--data", str(write_official(name, tmp_path)), "--out", str(tmp_path / "out")]
        command += ["--captions", str(captions(tmp_path, texts)), "--judge", server.url, "--judge-model", "by letter"]
        assert main([*command, "--json", *map(str, more)]) == status
    captured = capsys.readouterr()
    return json.loads(captured.out), server


PERFECT = {
    "video-salmonn-2": {"miss": 0, "hallucination": 0, "total": 0},
    "ugc-videocap": {"audio": 100, "visual": 100, "detail": 100, "average": 100},
    "daily-omni": {"accuracy": 100, "unknown": 0},
    "worldsense": {"accuracy": 100, "unknown": 0},
    "vdc": {"accuracy": 100, "score": 5, "accuracy_all": 100, "score_all": 5, "zero_clips": 0},
    "dream-1k": {"f1": 100, "precision": 100, "recall": 100},
    "probes": {"accuracy": 100, "unknown": 0},
}
PLAIN = {"dialogue_f1": None, "repcol": 0, "length": 7}
# Captions with omissions, one error and one invention: 3 of 10 events are stated.
PARTIAL = {"one": "a red kite rises. no a dog barks twice. a unicorn sings", "two": "a bell rings", "three": "nothing"}
PARTIAL_FIGURES = {
    # missed: the wind; tea; all five of three. 7 of 10; told wrongly: the dog; invented: one.
    "video-salmonn-2": {"miss": 70, "hallucination": 20, "total": 90},
    "ugc-videocap": {"audio": 20, "visual": 40, "detail": 80, "average": 140 / 3},
    # one: "a unicorn sings" comes first among its choices; two: the bell; three: "nothing" is a choice too, and wrong.
    "daily-omni": {"accuracy": 10, "unknown": 10},
    "worldsense": {"accuracy": 30, "unknown": 60},
    # clips: 2/3, 1/2, 0; the last is left out as published. scores: (5 + 5 + 1) / 3, 3, 1.
    "vdc": {
        "accuracy": 100 * (2 / 3 + 1 / 2) / 2,
        "score": (11 / 3 + 3) / 2,
        "accuracy_all": 100 * (2 / 3 + 1 / 2) / 3,
        "score_all": (11 / 3 + 3 + 1) / 3,
        "zero_clips": 1,
    },
    # recall 2/3, 1/2, 0; precision: of one's three events one stands in the reference, two's only, and not "nothing".
    "dream-1k": {
        "f1": 2 * 700 / 18 * 400 / 9 / (700 / 18 + 400 / 9),
        "precision": 400 / 9,
        "recall": 700 / 18,
    },
    "probes": {"accuracy": 30, "unknown": 60},
}


@pytest.mark.parametrize("name", EVERY)
def test_references_score_perfectly_with_an_exact_judge(name, tmp_path, capsys):
    result, server = evaluate(capsys, tmp_path, name)
    assert result["metrics"] == pytest.approx(PERFECT[name] | PLAIN)
    assert (result["n"], result["missing"], result["failed"]) == (3, 0, [])
    assert len(server.requests) == {
        "video-salmonn-2": 21,
        "ugc-videocap": 3,
        "vdc": 20,
        "dream-1k": 6,
        "probes": 3,
    }.get(name, 10)
    for request in server.requests:
        assert "eval" not in request["messages"][0]["content"]
        assert request["response_format"]["json_schema"]["schema"]["additionalProperties"] is False


@pytest.mark.parametrize("name", EVERY)
def test_partial_captions_score_the_values_computed_by_hand(name, tmp_path, capsys):
    result, _ = evaluate(capsys, tmp_path, name, PARTIAL)
    assert result["metrics"] == pytest.approx(PARTIAL_FIGURES[name] | PLAIN)
    table = (tmp_path / "out" / "table.md").read_text()
    for system in PUBLISHED[name]:
        assert f"| {system} (published) |" in table
    assert "| **mine** |" in table
    lines = [json.loads(line) for line in (tmp_path / "out" / "items.jsonl").read_text().splitlines()]
    assert [line["id"] for line in lines] == list(CLIPS)
    assert [line["caption"] for line in lines] == list(PARTIAL.values())
    assert len(lines[0]["rounds"]) == BENCHMARKS[name].rounds


def test_metrics_by_type_and_duration(tmp_path, capsys):
    result, _ = evaluate(capsys, tmp_path, "daily-omni", {**CAPTIONS, "three": "rain falls"})
    short, long = result["by"]["duration"]["30s"], result["by"]["duration"]["60s"]
    assert (short["n"], short["accuracy"], long["n"], long["accuracy"]) == (5, 100, 5, 20)
    kinds = result["by"]["type"]
    assert (kinds["Sight"]["n"], kinds["Sound"]["n"]) == (6, 4)
    assert kinds["Sight"]["accuracy"] == pytest.approx(100 * 4 / 6)
    assert kinds["Sound"]["accuracy"] == pytest.approx(100 * 2 / 4)


def test_median_round_is_reported_with_the_spread(tmp_path, capsys):
    """Rounds miss 1, 2, 3, 4 and 5 of ten events; the result is that of one round, not a mean."""
    counts, lock = {}, threading.Lock()

    def rising(number, request):
        question = request["messages"][-1]["content"]
        if "thunder" not in question:
            return None
        with lock:
            counts[question] = missed = counts.get(question, 0) + 1
        return json.dumps({"missed": missed, "incorrect": 0, "hallucination": 0})

    result, server = evaluate(capsys, tmp_path, "video-salmonn-2", CAPTIONS, "--rounds", 5, fault=rising)
    assert len(server.requests) == 15
    assert result["metrics"]["miss"] == 30
    assert result["spread"]["miss"] == [10, 50]
    assert sorted(one["total"] for one in result["rounds"]) == [10, 20, 30, 40, 50]


def test_invalid_answers_are_counted_as_missing(tmp_path, capsys):
    """The judge never answers for one of three clips: metrics are those of the others, and the number is reported."""

    def silent(number, request):
        return "I would rather not." if "a man pours tea" in request["messages"][-1]["content"] else None

    result, _ = evaluate(capsys, tmp_path, "video-salmonn-2", PARTIAL, fault=silent)
    assert (result["asked"], result["missing"]) == (21, 7)
    assert result["metrics"]["miss"] == pytest.approx(100 * 6 / 8)
    assert result["metrics"]["hallucination"] == pytest.approx(100 * 2 / 8)
    ((why, count),) = result["why"].items()
    assert "no JSON object" in why
    assert count == 7
    assert "7 of 21 answers are missing" in (tmp_path / "out" / "table.md").read_text()


def test_run_fails_if_the_judge_never_answers(tmp_path, capsys):
    result, _ = evaluate(capsys, tmp_path, "ugc-videocap", PARTIAL, status=1, fault=lambda *_: "{}")
    assert result["metrics"] == {"audio": None, "visual": None, "detail": None, "average": None, **PLAIN}
    assert result["missing"] == result["asked"] == 3


def test_judged_items_are_not_judged_again(tmp_path, capsys):
    first, _ = evaluate(capsys, tmp_path, "vdc", PARTIAL)
    again, silent = evaluate(capsys, tmp_path, "vdc", PARTIAL)
    assert again == first
    assert silent.requests == []
    _, changed = evaluate(capsys, tmp_path, "vdc", {**PARTIAL, "two": "a bell"})
    assert 0 < len(changed.requests) <= 4


def test_metrics_without_a_judge(tmp_path, capsys):
    data, texts = write_official("video-salmonn-2", tmp_path), {**CAPTIONS, "one": "round and round, " * 9}
    command = [
        "evaluate",
        "video-salmonn-2",
        "--data",
        str(data),
        "--captions",
        str(captions(tmp_path, texts)),
        "--json",
    ]
    assert main(command) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["metrics"] == {"dialogue_f1": None, "repcol": pytest.approx(100 / 3), "length": 7}
    assert result["judge"] is None
    assert (tmp_path / "video-salmonn-2-mine" / "page.html").is_file()


def test_custom_prompts(tmp_path, capsys):
    folder = tmp_path / "prompts"
    folder.mkdir()
    data, captions_file = str(write_official("ugc-videocap", tmp_path)), str(captions(tmp_path))
    prompt = folder / "ugc-videocap.md"
    command = ["evaluate", "ugc-videocap", "--data", data, "--captions", captions_file, "--prompts", str(folder)]
    for text, message in ((None, "No such file"), ("Grade.", "names no field"), ("{{question}}", "names {{question}}")):
        if text is not None:
            prompt.write_text(text)
        assert main(command) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1
    prompt.write_text('Grade {{caption}} as {"audio": n}.\n---\nBy {{reference}}')
    with chat_server(lambda *_: '{"Audio": 1, "VISUAL": 2, " detail": 3}') as server:
        nasty = {"one": "{{reference}} \\1", "two": "{{material}}", "three": "x"}
        captions(tmp_path, nasty)
        assert main([*command, "--judge", server.url, "--judge-model", "m", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metrics"]["average"] == 40
    prompts = {request["messages"][0]["content"] for request in server.requests}
    assert prompts == {f'Grade {text} as {{"audio": n}}.' for text in nasty.values()}
    assert {request["messages"][1]["content"] for request in server.requests} == {f"By {c}" for c in CAPTIONS.values()}


@pytest.mark.parametrize("name", EVERY)
def test_wrong_data_file_is_a_one_line_error(name, tmp_path, capsys):
    data = write_official(name, tmp_path)
    whole = data.read_bytes()
    captions_file = captions(tmp_path)
    lines = name in ("vdc", "dream-1k", "probes")
    wrong = {
        "half": whole[: len(whole) // 2],
        "empty": b"",
        "nothing": b"[]" if isinstance(official_content(name), list) else b"{}",
        "bytes": b"\xff\xfe\x00",
        "number": b"3",
        "deep": b"[" * 100_000,
        "twice": whole * 2 if lines else b"[" + whole[1:-1] + b", " + whole[1:-1] + b"]",
        **{f"of {other}": json.dumps(official_content(other)).encode() for other in EVERY if other != name},
        "no letter": whole.replace(b'"answer": "A"', b'"answer": "Q"').replace(b'"Answer": "B"', b'"Answer": 1'),
        "null": re.sub(rb'"([AB]. )?a dog barks twice"', b"null", whole),
    }
    if name not in ("daily-omni", "worldsense"):
        del wrong["no letter"]
    if name == "worldsense" or name == "ugc-videocap":
        del wrong["twice"]  # in an object the last value counts
    if name == "ugc-videocap":
        del wrong["null"]
    for what, content in wrong.items():
        data.write_bytes(content)
        command = [
            "evaluate",
            name,
            "--data",
            str(data),
            "--captions",
            str(captions_file),
            "--out",
            str(tmp_path / "o"),
        ]
        assert main(command) == 2, what
        captured = capsys.readouterr()
        assert captured.err.startswith("avocado evaluate: "), what
        assert captured.err.count("\n") == 1, what
        assert data.name in captured.err, what
        assert captured.out == "", what


def test_invalid_input_is_a_one_line_error(tmp_path, capsys):
    data, captions_file = str(write_official("ugc-videocap", tmp_path)), str(captions(tmp_path))
    with_captions = ["ugc-videocap", "--data", data, "--captions", captions_file]
    tour = [
        (["ugc-videocap", "--data", data], "one of --videos DIR (the clips) and --captions FILE is required"),
        (["ugc-videocap", "--data", data, "--videos", str(tmp_path)], "nor any other video"),
        (
            ["ugc-videocap", "--data", data, "--videos", str(tmp_path), "--shard", "3/2"],
            "--shard 3/2: not I/N with I from 0",
        ),
        ([*with_captions, "--shard", "1/2"], "--shard and --captions exclude"),
        ([*with_captions, "--judge", "http://localhost"], "--judge needs --judge-model"),
        ([*with_captions, "--judge", "localhost", "--judge-model", "m"], "the judge's URL"),
        ([*with_captions, "--judge-model", str(tmp_path / "none")], "none: no such folder"),
        ([*with_captions, "--rounds", "0"], "--rounds is 0"),
        (["world", "--data", data, "--judge", "http://localhost"], "--judge is for the public benchmarks"),
        (["world", "--data", data, "--dry-run"], "--dry-run is for the public benchmarks"),
        (["world", "--data", data, "--request", '{"seed": 1}'], "--request is for the public benchmarks"),
        ([*with_captions, "--request", "[]"], "--request is not a JSON object"),
        ([*with_captions, "--request", '{"model": "x"}'], '--request may not set "model"'),
        ([*with_captions, "--budget-calls", "5"], "--budget-calls needs --judge URL"),
        ([*with_captions, "--dry-run"], "--dry-run needs --judge URL"),
        ([*with_captions, "--judge", "http://a/v1", "--judge-model", "m", "--budget-tokens", "-1"], "is -1"),
    ]
    for command, message in tour:
        assert main(["evaluate", *command]) == 2, command
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1


@pytest.mark.slow  # takes seconds to compile; tests/rewards test it
def test_dialogue_is_scored_if_references_have_dialogue(monkeypatch):
    monkeypatch.undo()
    other = "He says “we stay until nightfall comes”."
    texts = [SPOKEN_LINE, other, SPOKEN_LINE, "nothing"]
    scores = public.dialogue_scores(texts, [SPOKEN_LINE, SPOKEN_LINE, None, "A sign reads nothing."])
    assert scores[0] == 1
    assert scores[1] < 0.5
    assert scores[2:] == [None, None]


SPOKEN_LINE = "She says “we leave at noon”."
assert sum(map(len, EVENTS.values())) == 10

"""Judging with faulty judges, kills and hostile texts: metrics stay correct, and no question is repeated."""

import json
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from benchmark_judge import CAPTIONS, honest_answer, write_official
from chat import chat_server
from chromium import browser

from avocado_jax.__main__ import main
from avocado_jax.eval import public
from avocado_jax.eval.benchmarks import BENCHMARKS
from avocado_jax.eval.benchmarks.benchmark import Record
from avocado_jax.eval.judging import judge_captions, read_prompts
from avocado_jax.eval.runner import Videos
from avocado_jax.remote import chat as client
from avocado_jax.remote.chat import ChatClient, Endpoint

EVENTS = [f"event {number}" for number in range(1, 7)]
RIGHT = {"missed": [1, 4], "incorrect": [2], "hallucination": ["a unicorn {sings}"]}
HOSTILE = (
    "</script><script>window.hacked=1</script>",
    '<img src=x onerror="window.hacked=1">',
    "`x` | **b** \u202e",
)


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(client, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(client, "LAST_PAUSE", 0.2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(public, "dialogue_scores", lambda captions, references: [None] * len(captions))


def mutated(random, whole):
    """A corrupted answer of a judge, and the expected result: RIGHT, None (nothing), or "any" (its new content)."""
    object_ = json.loads(whole)
    before, after = random.choice([("Sure: ", " Hope that helps."), ("```json\n", "\n```"), ("这是答案：", "。完毕"), (
        '<think>{"missed": 1, "incorrect": 0, "hallucination": 0}?</think>', ""), ("{" * 9, "}} {")])  # fmt: skip
    number = random.randrange(7, 99)
    wrong = random.choice(
        [
            {"missed": [1, 4, number]},
            {"missed": [1, 1]},
            {"incorrect": [1]},
            {"missed": 4, "incorrect": 3},
            {"missed": 5, "incorrect": [2, 3]},
            {"missed": -1},
            {"missed": [0]},
            {"missed": "[1, 4]"},
            {"missed": None},
            {"missed": True},
            {"missed": 2.0},
            {"missed": [1.5]},
            {"missed": [[1]]},
            {"missed": {"1": "missed"}},
            {"incorrect": ["2"]},
            {"hallucination": 10 ** random.randrange(4, 4000)},
            {"hallucination": [1]},
            {"hallucination": "one"},
        ]
    )
    index, lost = random.randrange(len(whole)), random.choice(list(object_))
    return random.choice(
        [
            lambda: (whole[:index], None),
            lambda: (before + whole + after, RIGHT),
            lambda: (before + whole[:index], None if "think" not in before else "any"),
            lambda: (json.dumps(object_ | wrong), None),
            lambda: (json.dumps({k: v for k, v in object_.items() if k != lost}), None),
            lambda: (random.choice(["", " ", "null", "[]", "{}", "N/A", "什么都没有。", "\x00", whole[1:-1]]), None),
            lambda: (" ".join(["word"] * 60_000) + whole, RIGHT),
            lambda: (whole + " " * 2**20, None),
            lambda: (whole[:index] + chr(random.randrange(32, 1000)) + whole[index + 1 :], "any"),
            lambda: (json.dumps({"Missed": [4, 1], "INCORRECT ": [2], "hallucination": RIGHT["hallucination"]}), RIGHT),
        ]
    )()


def test_thousand_corrupted_answers_are_parsed_correctly_or_missing():
    rng = random.Random(0)
    answers = [mutated(rng, json.dumps(RIGHT)) for _ in range(1000)]
    records = [Record(str(number), (), None, None, EVENTS) for number in range(1000)]

    def answer(number, request):
        return answers[int(json.loads(request["messages"][-1]["content"])["caption"])][0]

    benchmark = BENCHMARKS["video-salmonn-2"]
    captions = {record.id: record.id for record in records}
    with chat_server(answer) as server, ChatClient(Endpoint(server.url, "m", tries=1)) as judge:
        (judged,) = judge_captions(benchmark, records, captions, judge, read_prompts(benchmark, None), 1)
    assert len(server.requests) == 1000
    read = 0
    for one, (text, wanted) in zip(judged, answers):
        (unit,) = one.units
        read_unit = {name: unit[name] for name in RIGHT if name in unit}
        read_unit |= {"missed": sorted(read_unit["missed"])} if isinstance(read_unit.get("missed"), list) else {}
        assert ("why" in unit) != (read_unit.keys() == RIGHT.keys())
        if wanted != "any":
            assert read_unit == (wanted or {}), text[:300]
        read += bool(read_unit)
    assert 200 < read < 600
    assert benchmark.measure(judged)["miss"] > 0


FAULTS = ("reset", "hang", "cut", "garbage", "trickle", (500, {}, b"no"), (503, {}, b"<html>"), (429, {}, b"{}"), "{}")


def test_every_metric_is_present_after_transient_faults():
    """The first call of every question fails in a different way; no question hangs or is lost."""
    records = [Record(f"c{number}", (), None, None, ["a dog", "a cat"]) for number in range(36)]
    captions = {record.id: f"{record.id}: a dog" for record in records}
    requested, lock = {}, threading.Lock()

    def faulty(number, request):
        question = request["messages"][-1]["content"]
        with lock:
            first = question not in requested
            which = requested.setdefault(question, len(requested))
        return FAULTS[which % len(FAULTS)] if first else honest_answer(request)

    benchmark = BENCHMARKS["video-salmonn-2"]
    with chat_server(faulty) as server, ChatClient(Endpoint(server.url, "m", timeout=0.5)) as judge:
        (judged,) = judge_captions(benchmark, records, captions, judge, read_prompts(benchmark, None), 1)
        assert judge.counts["passing"] >= 32
    assert benchmark.measure(judged) == {"miss": 50, "hallucination": 0, "total": 50}
    assert not any("why" in unit for one in judged for unit in one.units)


def test_killed_run_does_not_repeat_judged_items(tmp_path, capsys):
    data = write_official("video-salmonn-2", tmp_path)
    captions_file = tmp_path / "mine.jsonl"
    captions_file.write_text(
        "".join(json.dumps({"id": clip, "caption": text}) + "\n" for clip, text in CAPTIONS.items())
    )
    command = [
        "evaluate",
        "video-salmonn-2",
        "--data",
        str(data),
        "--captions",
        str(captions_file),
        "--out",
        str(tmp_path / "o"),
    ]
    running = []

    def kill(number, request):
        if number == 19:  # sixteen calls at once: the first answers have arrived
            os.kill(running[0].pid, signal.SIGKILL)
        return honest_answer(request)

    program = "import sys; from avocado_jax.__main__ import main; sys.exit(main(sys.argv[1:]))"
    with chat_server(kill) as server:
        judge = ["--judge", server.url, "--judge-model", "m"]
        running.append(subprocess.Popen([sys.executable, "-c", program, *command, *judge], stderr=subprocess.DEVNULL))
        assert running[0].wait(240) == -signal.SIGKILL
    kept = {path.stem for path in (tmp_path / "o" / "answers").rglob("*.json")}
    assert 3 <= len(kept) < 21
    assert not (tmp_path / "o" / "result.json").exists()
    with chat_server(lambda number, request: honest_answer(request)) as server:
        assert main([*command, "--judge", server.url, "--judge-model", "m", "--json"]) == 0
    assert len(server.requests) == 21 - len(kept)
    assert json.loads(capsys.readouterr().out)["metrics"]["total"] == 0


@pytest.fixture
def hostile(tmp_path, capsys):
    """Results of captions, answers and names that contain markup."""
    data = write_official("ugc-videocap", tmp_path)
    content = json.loads(data.read_text())
    for sample, text in zip(content["samples"], HOSTILE):
        sample |= {"video_id": f"../{text}", "answer": text}
    data.write_text(json.dumps(content))
    captions_file = tmp_path / f"{HOSTILE[1].replace('/', '')}.jsonl"
    captions_file.write_text("".join(json.dumps({"id": f"../{text}", "caption": text}) + "\n" for text in HOSTILE))
    command = [
        "evaluate",
        "ugc-videocap",
        "--data",
        str(data),
        "--captions",
        str(captions_file),
        "--videos",
        str(tmp_path),
    ]
    with chat_server(lambda number, request: HOSTILE[0] if number == 0 else honest_answer(request)) as server:
        judge = ["--judge", server.url, "--judge-model", HOSTILE[1], "--rounds", "2"]
        assert main([*command, "--out", str(tmp_path / "out"), *judge]) == 0
    capsys.readouterr()
    return tmp_path / "out"


def test_hostile_texts_are_escaped(hostile):
    page, table = ((hostile / name).read_text() for name in ("page.html", "table.md"))
    assert page.count("</script>") == 2  # the data's and the page's own
    assert page.count("<script") == 2
    for text in HOSTILE[:2]:
        assert text not in page
        assert text not in table
    assert "<img" not in page + table


@pytest.mark.slow  # a browser
def test_page_renders_texts_as_plain_text(hostile):
    with browser() as page:
        page.open((hostile / "page.html").as_uri())
        assert page.evaluate("document.querySelectorAll('article').length") == 3
        assert page.evaluate("document.querySelectorAll('article .text')[0].textContent") == HOSTILE[0]
        assert page.evaluate("typeof window.hacked") == "undefined"
        assert page.evaluate("document.querySelectorAll('img').length") == 0
        page.evaluate("document.getElementById('find').value = 'onerror'")
        page.evaluate("document.getElementById('find').dispatchEvent(new Event('input'))")
        assert page.evaluate("document.getElementById('count').textContent") == "1 of 3 clips"
        assert not page.errors
        assert not page.dialogs


def test_item_names_cannot_escape_the_folder(tmp_path):
    folder = tmp_path / "videos"
    (folder / "video").mkdir(parents=True)
    for path in (tmp_path / "0.mp4", folder / "1.mp4", folder / "video" / "2.mkv", folder / "3.webm"):
        path.write_bytes(b"x")

    def found(*names):
        return Path(public.find_video(Videos(str(folder)), Record("", names, None, None, None)))

    assert found("video/1.mp4") == folder / "1.mp4"
    assert found("video/2") == folder / "video" / "2.mkv"
    assert found("3") == folder / "3.webm"
    assert found("x", "3") == folder / "3.webm"
    for name in ("../0.mp4", str(tmp_path / "0.mp4"), "a/../../0.mp4", "0.mp4\0", ""):
        assert not found(name).is_file()
        assert folder in found(name).parents


def result(folder: Path, name, model, judge="m", **metrics):
    path = folder / model / name / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"benchmark": name, "model": model, "judge": {"model": judge}, "metrics": metrics}))
    return path


def test_report_has_the_layout_of_the_papers_table_4(tmp_path, capsys):
    result(tmp_path, "video-salmonn-2", "mine|", miss=1.0, total=40.04, dialogue_f1=70.0, repcol=0.5)
    result(tmp_path, "daily-omni", "mine|", accuracy=48.0, dialogue_f1=None, repcol=1.0)
    result(tmp_path, "vdc", "other", judge="n", accuracy=1.0)
    assert main(["report", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    assert lines[0].count("|") == 8
    assert "| SFT (published) | 41.4 | 74.4 | 3.5 | 48.1 | 73.6 | 5.1 |" in lines
    assert lines[-2:] == [r"| mine\| | 40.0 | 70.0 | 0.5 | 48.0 |  | 1.0 |", "| other |  |  |  |  |  |  |"]
    assert "2 judges" in captured.err
    assert main(["report", str(tmp_path / "other"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"model": "other", "results": {"vdc": {"accuracy": 1.0}}}
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad.json").write_text('{"metrics": {"a": "b"}, "benchmark": "x", "model": "y"}')
    again = result(tmp_path / "again", "vdc", "other", accuracy=2.0)
    for folders, message in (
        (["bad"], "no result.json of"),
        (["bad.json"], "must be numbers"),
        (["none"], "No such file"),
        (["other", str(again)], "a second result"),
    ):
        assert main(["report", *(str(tmp_path / folder) for folder in folders)]) == 2
        errors = capsys.readouterr().err
        assert message in errors
        assert errors.count("\n") == 1

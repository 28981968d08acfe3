"""Answers in the forms of the official prompts, official files, and `--official`."""

import json
import re
from pathlib import Path

import pytest
from benchmark_judge import CAPTIONS, honest_answer, official_content, write_official
from chat import chat_server

from avocado_jax.__main__ import main
from avocado_jax.eval import public
from avocado_jax.eval.benchmarks import BENCHMARKS
from avocado_jax.eval.benchmarks.benchmark import Judged, Record, officially
from avocado_jax.eval.metrics import remove_repetitions
from avocado_jax.remote.answers import objects

SIX = tuple(name for name in BENCHMARKS if name != "probes")
README = Path(public.__file__).parent / "README.md"


@pytest.fixture(autouse=True)
def _without(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(public, "dialogue_scores", lambda captions, references: [None] * len(captions))


def in_official_form(request):
    """The honest answer in the form that the official prompts request."""
    answer, kind = json.loads(honest_answer(request)), request["response_format"]["json_schema"]["name"]
    material = json.loads(request["messages"][-1]["content"])
    if kind == "Events":
        counts = {name.capitalize(): len(answer[name]) for name in ("missed", "incorrect", "hallucination")}
        lists = {f"{name.capitalize()} Event": [f"it's {one}" for one in each] for name, each in answer.items()}
        return json.dumps(counts | lists)
    if kind == "Grades":
        return str({"visual": answer["visual"], "audio": answer["audio"], "details": answer["detail"]})
    if kind == "Choice":
        return answer["answer"]
    if kind == "Told" and "question" in material:
        return answer["answer"]
    if kind == "Told":
        return f"```python\n{answer}\n```"
    if kind == "Graded":
        return f"{{'pred': '{answer['pred']}', 'score': {answer['score']},}}"
    verdicts = {verdict["number"]: verdict["verdict"] for verdict in answer["verdicts"]}
    events = [
        {"event": text, "relationship": verdicts[int(number)].capitalize(), "reason": "it's in the text"}
        for number, text in material["events"].items()
    ]
    return json.dumps({"events": events})


def evaluate(capsys, tmp_path, name, captions, answer, *more, data=None):
    """Run the command. Returns the result and the requests to the judge."""
    captions_file = tmp_path / "mine.jsonl"
    captions_file.write_text(
        "".join(json.dumps({"id": clip, "caption": text}) + "\n" for clip, text in captions.items())
    )
    with chat_server(lambda number, request: answer(request)) as server:
        data = data or write_official(name, tmp_path)
        command = [
            "evaluate",
            name,
            "--data",
            str(data),
            "--captions",
            str(captions_file),
            "--out",
            str(tmp_path / "out"),
        ]
        assert main([*command, "--judge", server.url, "--judge-model", "m", "--json", *more]) == 0
    return json.loads(capsys.readouterr().out), server.requests


PARTIAL = {"one": "a red kite rises. no a dog barks twice. a unicorn sings", "two": "a bell rings", "three": "nothing"}


@pytest.mark.parametrize("name", SIX)
def test_answers_in_the_official_form_are_parsed(name, tmp_path, capsys):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    expected, _ = evaluate(capsys, tmp_path / "a", name, PARTIAL, honest_answer)
    found, requests = evaluate(capsys, tmp_path / "b", name, PARTIAL, in_official_form)
    assert found["metrics"] == expected["metrics"]
    assert (found["missing"], found["asked"]) == (0, expected["asked"])
    questions = {request["messages"][-1]["content"] for request in requests}
    assert len(requests) == len(questions) * BENCHMARKS[name].rounds  # no request is sent twice


CHOICES = ("B", " b ", "(B)", "B.", "**B**", "B. {text}", "{text}", "Answer: B", "The correct answer is B.")
CHOICES += ("<think>A or B?</think>\nB", "The bell is second.\n\nB", '{{"answer": "B"}}', "{{'answer': 'B) {text}'}}")


@pytest.mark.parametrize("given", CHOICES)
def test_choices_parse_in_any_form(given, tmp_path, capsys):
    """Daily-Omni, where B is right."""

    def answer(request):
        choices = json.loads(request["messages"][-1]["content"])["choices"]
        return given.format(text=choices["B"])

    result, _ = evaluate(capsys, tmp_path, "daily-omni", CAPTIONS, answer)
    assert (result["metrics"]["accuracy"], result["missing"]) == (100, 0)


@pytest.mark.parametrize("given", ["E", "A or B", "I cannot say.", "Bell", '{"letter": "B"}', ""])
def test_invalid_choices_are_missing_or_officially_wrong(given, tmp_path, capsys):
    result, _ = evaluate(capsys, tmp_path, "daily-omni", CAPTIONS, lambda r: given if "kite" in str(r) else "B")
    assert (result["metrics"]["accuracy"], result["missing"], result["asked"]) == (100, 3, 10)
    result, requests = evaluate(capsys, tmp_path, "daily-omni", CAPTIONS, lambda _: given, "--official")
    assert (result["metrics"]["accuracy"], result["missing"]) == (70, 3)
    assert result["judge"]["official"] == list(BENCHMARKS["daily-omni"].official.notes)
    assert {json.loads(request["messages"][-1]["content"])["caption"] for request in requests} == {CAPTIONS["one"]}


UNITS = {  # two clips, of which the second has no valid answer; what counts, and what counts officially
    "ugc-videocap": ([{"audio": 5, "visual": 5, "detail": 5}], [{"why": "x"}], {"average": 100}, {"average": 50}),
    "worldsense": (
        [{"truth": "A", "answer": "A"}],
        [{"truth": "A", "why": "x"}],
        {"accuracy": 100, "unknown": 0},
        {"accuracy": 50, "unknown": 0},
    ),
    "vdc": (
        [{"answer": "x", "correct": True, "score": 5}],
        [{"answer": "x", "correct": True, "score": 5}, {"answer": "x", "why": "y"}, {"why": "y"}],
        {"accuracy": 100, "score": 5},
        {"accuracy": 75, "score": 3.75},
    ),
    "dream-1k": (
        [{"what": "recall", "verdicts": ["entailment"]}, {"what": "precision", "verdicts": ["neutral"]}],
        [{"what": "recall", "verdicts": ["neutral"]}, {"what": "precision", "why": "x"}],
        {"recall": 50, "precision": 0},
        {"recall": 100, "precision": 0},
    ),
    "video-salmonn-2": (
        [{"events": 2, "missed": 1, "incorrect": 0, "hallucination": 0}],
        [{"why": "x"}],
        {"total": 50},
        {"total": 50},
    ),
}


@pytest.mark.parametrize("name", UNITS)
def test_official_metrics_count_invalid_answers(name):
    one, other, ours, theirs = UNITS[name]
    judged = [Judged(Record(str(n), (), None, None, None), units) for n, units in enumerate((one, other))]
    for benchmark, figures in ((BENCHMARKS[name], ours), (officially(BENCHMARKS[name]), theirs)):
        measured = benchmark.measure(judged)
        assert {figure: measured[figure] for figure in figures} == pytest.approx(figures)


def test_readme_table_lists_all_official_differences():
    table = README.read_text().split("## The official treatment")[1]
    for name, benchmark in BENCHMARKS.items():
        for note in benchmark.official.notes:
            assert note.rstrip(".") in " ".join(table.split()), name
    assert all(BENCHMARKS[name].official.notes for name in SIX)


def test_official_preprocessing_cuts_repetitions_and_lowers_case(tmp_path, capsys):
    loop = {**CAPTIONS, "one": "A red kite rises. " + "ha ha! " * 40 + "THE END"}
    for name, shown in (("video-salmonn-2", "A red kite rises. ha ha! THE END"), ("dream-1k", loop["one"].lower())):
        for more, wanted in (((), loop["one"]), (("--official",), shown)):
            folder = tmp_path / f"{name}{len(more)}"
            folder.mkdir()
            _, requests = evaluate(capsys, folder, name, loop, honest_answer, *more)
            material = [json.loads(request["messages"][-1]["content"]) for request in requests]
            captions = {one.get("caption") for one in material if "caption" in one}
            assert wanted in captions


UNIT = "Here are sixty letters, of which no stretch follows itself.!"  # 60 characters


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("ababababab", "ab"),
        ("abababab", "abababab"),
        ("x" * 201, "x"),
        ("x" * 300, "xx"),  # at most 201 units at once
        ("0123456789" * 5 + "!", "0123456789!"),
        (UNIT * 4, UNIT),
        (UNIT * 3, UNIT * 3),
        ("a\n" * 9, "a\n" * 9),
        ("plain words, each once", "plain words, each once"),
    ],
)
def test_repetitions_are_cut_by_the_official_rule(text, expected):
    assert remove_repetitions(text) == expected


def test_dream_records_without_events_are_valid_and_count_as_published(tmp_path, capsys):
    """No event in the reference: recall 1; none in the caption: precision 1. Means over subsets, then the F1."""
    lines = official_content("dream-1k")
    lines[2]["extra_info"] |= {"events": [], "n_events": 0}
    for line, subset in zip(lines, ("DREAM/a", "DREAM/a", "DREAM/b")):
        line["dataset"] = subset
    data = tmp_path / "dream.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    captions = {"one": CAPTIONS["one"], "two": "a bell rings", "three": "She says nothing"}
    result, requests = evaluate(capsys, tmp_path, "dream-1k", captions, honest_answer, data=data)
    # recall: a: (1 + 1/2) / 2, b: 1; precision: 1 everywhere
    recall = (0.75 + 1) / 2
    assert result["metrics"]["recall"] == pytest.approx(100 * recall)
    assert result["metrics"]["precision"] == 100
    assert result["metrics"]["f1"] == pytest.approx(200 * recall / (1 + recall))
    assert len(requests) == 2 + 3 + 1  # equal questions are one; of the last clip only its caption's events


@pytest.mark.parametrize("name", [name for name in SIX if not BENCHMARKS[name].sound])
def test_silent_benchmarks_request_visual_captions_only(name, tmp_path):
    prompts = {record.prompt for record in BENCHMARKS[name].read(write_official(name, tmp_path))}
    assert all(prompts)
    assert not any(re.search("audio|sound|hear", prompt, re.I) for prompt in prompts)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("{'a': 1}", [{"a": 1}]),
        ("{'a': True, 'b': None, 'c': [1, 2,],}", [{"a": True, "b": None, "c": [1, 2]}]),
        ("""{'it': "it's {so}", "b": 'a "quote"'}""", [{"it": "it's {so}", "b": 'a "quote"'}]),
        ("{'a': {'b': 'c'}} and {\"d\": 1}", [{"a": {"b": "c"}}, {"d": 1}]),
        ("{'a': 1, 'a': 2}", []),
        ("{'a': {'b': 1, 'b': 2}}", []),
        ("{'a': 1", []),
        ("{'a': __import__('os')}", []),
        ("{'a': 1 + 1}", []),
        ("{1: 2}", []),
        ("{'a'}", []),
        ("{'a': 'b\\W'}", []),
        ("{" * 10**5 + "'a': 1}", []),  # only the first openings are tried
        ("{'a': " * 10**5, []),
        ("{'a': '" + "\\" * 10**5, []),
        ("{'a': " + "9" * 10**4 + "}", []),
    ],
)
def test_python_dictionaries_are_parsed(text, found):
    """Only where the official prompt requests them: a broken JSON object stays invalid."""
    assert objects(text, python=True) == found

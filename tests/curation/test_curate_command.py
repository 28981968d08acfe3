"""`curate` against a real server: the truth comes back, what is not true is rejected where it is found out."""

import json
import os
import signal
import subprocess
import sys

import pytest
from chat import chat_server
from clips import write
from teller import SMALL, Teller, make_clips, stage_of, told_apart, unique_keypoints

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.load import shipped_checkpoint
from avocado_jax.cli import curate as command
from avocado_jax.data.sources import open_shards, prepared_reading
from avocado_jax.remote import chat as module
from avocado_jax.world.check import measure

QUICK = [*SMALL, "--patience", "120", "--timeout", "60", "--json"]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    """Pauses of a tenth, and no key of the machine's."""
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.setattr(module, "LAST_PAUSE", 0.2)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture(scope="module")
def teller(tmp_path_factory):
    """A teller of three small clips."""
    return Teller(make_clips(tmp_path_factory.mktemp("curate") / "clips", [(0, 0), (1, 0), (2, 1)]))


def curate(capsys, teller, out, url, *more):
    """Exit status, the counts, the manifest, the rejects by id, and stderr."""
    videos = [str(truth["path"]) for truth in teller.truths]
    status = main(["curate", *videos, "--out", str(out), "--url", url, "--model", "m", *QUICK, *more])
    said = capsys.readouterr()
    counts = json.loads(said.out) if said.out else None
    manifest, rejects = (
        [json.loads(line) for line in (out / name).read_text().splitlines()] if (out / name).exists() else []
        for name in ("manifest.jsonl", "rejects.jsonl")
    )
    return status, counts, manifest, {one["id"]: one for one in rejects}, said.err


def check_truth(manifest, truths, out):
    """The manifest is the clips' truth."""
    assert [line["id"] for line in manifest] == [truth["id"] for truth in truths]
    for line, truth in zip(manifest, truths):
        assert (out / line["video"]).samefile(truth["path"])
        scores = measure(line["caption"], truth)
        assert (scores.recall, scores.hallucination, scores.order, scores.dialogue_f1) == (1.0, 0.0, 1.0, 1.0)
        assert line["keypoints"] == unique_keypoints(truth)
        assert line["dialogues"] == [{"speaker": one["speaker"], "text": one["text"]} for one in truth["dialogues"]]


def test_the_truth_comes_back_and_is_never_asked_for_again(teller, tmp_path, capsys):
    out = tmp_path / "out"
    with chat_server(teller) as server:
        status, counts, manifest, rejects, _ = curate(capsys, teller, out, server.url)
        assert (status, rejects) == (0, {})
        check_truth(manifest, teller.truths, out)
        assert len(server.requests) == 18
        assert counts["calls"] == 18
        again = curate(capsys, teller, out, server.url)
        assert len(server.requests) == 18
    assert again[:3] == (0, counts, manifest)
    kept = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(kept) == 18
    assert {one["clip"] for one in kept} == {truth["id"] for truth in teller.truths}


def without(text, caption):
    """The caption without a sentence."""
    assert text in caption
    return caption.replace(text, "").strip()


def swapped(caption):
    """The caption with its last sentence first."""
    *first, last = caption.rstrip(".").split(". ")
    return f"{last}. {'. '.join(first)}."


FALSE = {  # what a server answers at a stage, where it is rejected, and why
    "drops a sentence": ("fusion", lambda t, a: {"caption": without(told_apart(t), t["caption"])}, "missing"),
    "drops what is said": (
        "fusion",
        lambda t, a: {"caption": without(t["dialogues"][0]["text"][:-1], t["caption"])},
        "changed",
    ),
    "invents a sentence": ("fusion", lambda t, a: {"caption": t["caption"] + " A dog barks."}, "neither"),
    "tells the end first": ("fusion", lambda t, a: {"caption": swapped(t["caption"])}, "too late"),
    "says all twice": ("fusion", lambda t, a: {"caption": f"{t['caption']} {t['caption']}"}, "words"),
    "repeats a sentence": ("fusion>repetition", lambda t, a: {"caption": t["caption"] + " And on." * 9}, "repeats"),
    "sees the same for ever": (
        "visual>repetition",
        lambda t, a: {"sentences": [{"start": 0, "text": "A red circle spins."}] * 9},
        "repeats",
    ),
    "sees nothing": ("visual", lambda t, a: {"sentences": []}, "no sentence"),
    "sees what is not there yet": ("visual", lambda t, a: {"sentences": [{"start": 99, "text": "A"}]}, "99 s is not"),
    "finds it incomplete": ("completeness", lambda t, a: {"score": 3}, "3 of 5"),
    "scores beyond the scale": ("completeness", lambda t, a: {"score": 6}, "score"),
    "invents a keypoint": (
        "keypoints",
        lambda t, a: {"keypoints": [*a["keypoints"], {"text": "Two dogs bark.", "dimension": "auditory"}]},
        "does not state",
    ),
    "joins keypoints": (
        "keypoints",
        lambda t, a: {"keypoints": [{"text": t["caption"], "dimension": "static"}]},
        "not one short",
    ),
    "invents a dimension": (
        "keypoints",
        lambda t, a: {"keypoints": [{"text": "A", "dimension": "fifth"}]},
        "dimension",
    ),
    "invents a line": (
        "dialogues",
        lambda t, a: {"dialogues": [*a["dialogues"], {"speaker": "the dog", "text": "Who are you?"}]},
        "does not hold",
    ),
    "says a line twice": ("dialogues", lambda t, a: {"dialogues": a["dialogues"][:1] * 2}, "earlier"),
}


@pytest.mark.parametrize("fault", FALSE)
def test_what_is_not_true_is_rejected_where_it_is_found_out(teller, fault, tmp_path, capsys):
    """One clip of two is told falsely however often it is asked about; the other is kept."""
    where, change, why = FALSE[fault]
    stage, _, rejected_at = where.partition(">")
    few = Teller(teller.truths[:2])
    bad, good = few.truths

    def lie(asked, truth, answer, attempt):
        return change(truth, answer) if (asked, truth) == (stage, bad) else answer

    with chat_server(few.but(lie)) as server:
        status, counts, manifest, rejects, _ = curate(capsys, few, tmp_path / "out", server.url)
    assert status == 0
    check_truth(manifest, [good], tmp_path / "out")
    (reject,) = rejects.values()
    assert (reject["id"], reject["stage"], reject["final"]) == (bad["id"], rejected_at or stage, True)
    assert why in reject["reason"]
    asked = [stage_of(request) for request in server.requests].count(stage)
    assert asked == (2 if fault == "finds it incomplete" else 1 + 3)
    assert counts["rejected"] == {rejected_at or stage: 1}


def test_what_is_put_right_when_asked_again_is_kept(teller, tmp_path, capsys):
    """The first answer at every stage is wrong in its own way, and the model is told how."""
    few = Teller(teller.truths[:1])
    wrong = {
        "visual": '```json\n{"sentences": [{"start": "0", "text": "A"}]}\n```',
        "audio": "I hear nothing.",
        "fusion": {"caption": without(told_apart(few.truths[0]), few.truths[0]["caption"])},
        "completeness": {"score": True},
        "keypoints": "",
        "dialogues": '{"dialogues": [{"speaker": "the',
    }
    with chat_server(few.but(lambda stage, _, answer, attempt: wrong[stage] if attempt == 1 else answer)) as server:
        status, counts, manifest, _, _ = curate(capsys, few, tmp_path / "out", server.url)
    assert (status, counts["calls"]) == (0, 12)
    check_truth(manifest, few.truths, tmp_path / "out")
    told = [request["messages"][3]["content"] for request in server.requests if len(request["messages"]) == 4]
    assert len(told) == 6
    assert any("missing: «" + told_apart(few.truths[0]) in words for words in told)


def test_filters_on_length_cost_no_more_calls(teller, tmp_path, capsys):
    with chat_server(teller) as server:
        _, _, _, rejects, _ = curate(capsys, teller, tmp_path / "long", server.url, "--most-tokens", "20")
        assert {stage_of(request) for request in server.requests} == {"visual", "audio"}
        _, _, _, short, _ = curate(capsys, teller, tmp_path / "short", server.url, "--fewest-tokens", "2000")
    assert {one["stage"] for one in rejects.values()} == {one["stage"] for one in short.values()} == {"length"}
    assert all("20 is the most" in one["reason"] for one in rejects.values())
    assert all("2000 is the fewest" in one["reason"] for one in short.values())
    assert "completeness" not in {stage_of(request) for request in server.requests}


def test_a_silent_clip_is_told_as_seen(tmp_path, capsys):
    """Nothing is asked about its sound, and no sentence could be lost."""
    path = write(tmp_path / "12:30 ä.mp4", sound=None)
    said = {
        "visual": {"sentences": [{"start": 0.5, "text": "A white square moves over four coloured quarters."}]},
        "keypoints": {"keypoints": [{"text": "A white square moves.", "dimension": "dynamic"}]},
    }
    asked = ["--url", "URL", "--model", "m", "--json", "--fewest-tokens", "1"]
    with chat_server(lambda _, request: json.dumps(said[stage_of(request)])) as server:
        asked[1] = server.url
        assert main(["curate", str(tmp_path), "--out", str(tmp_path / "out"), *asked]) == 0
    assert len(server.requests) == 2
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert line == {
        "id": "12:30 ä",
        "video": "../12:30 ä.mp4",
        "caption": "A white square moves over four coloured quarters.",
        "dialogues": [],
        "keypoints": said["keypoints"]["keypoints"],
    }
    assert path.exists()
    capsys.readouterr()


def test_prepare_reads_the_manifest(teller, tmp_path, capsys):
    """What was curated is what a training row holds."""
    with chat_server(teller) as server:
        _, _, manifest, _, _ = curate(capsys, teller, tmp_path / "out", server.url)
    options = ["--workers", "1", "--reading", "fewest_pixels=12544", "--reading", "asked_pixels=12544", "--json"]
    assert main(["prepare", str(tmp_path / "out" / "manifest.jsonl"), str(tmp_path / "shards"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 3
    source = open_shards(str(tmp_path / "shards"), prepared_reading(str(tmp_path / "shards")))
    for number, line in enumerate(manifest):
        fields = source[number].fields
        assert fields == {name: value for name, value in line.items() if name != "video"}


FAULTS = {  # of the first time that a question is asked
    "reset": "reset",
    "cut": "garbage",
    "slow": "hang",
    "429": (429, {"Retry-After": "0"}, b"{}"),
    "500": (500, {}, b"oops"),
    "no answer of the protocol": b"<html>busy</html>",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_passes_costs_time_and_nothing_else(teller, fault, tmp_path, capsys):
    few, seen_before = Teller(teller.truths[:1]), set()

    def broken(number, request):
        asked = json.dumps(request["messages"], sort_keys=True)
        if asked in seen_before:
            return few(number, request)
        seen_before.add(asked)
        return FAULTS[fault]

    late = ["--timeout", "1"] if FAULTS[fault] == "hang" else []
    with chat_server(broken) as server:
        status, counts, manifest, _, _ = curate(capsys, few, tmp_path / "out", server.url, *late)
    assert status == 0
    assert counts["calls"] == len(server.requests) >= 12
    assert late or counts["calls"] == 12
    check_truth(manifest, few.truths, tmp_path / "out")


@pytest.mark.parametrize("fault", ["reset", "hang", (503, {}, b"busy"), (400, {}, b"no"), b"<html>"])
def test_an_endpoint_that_never_answers_ends_the_run(teller, fault, tmp_path, capsys):
    """No clip is called bad for it, and the next run asks again."""
    out = tmp_path / "out"
    with chat_server(lambda *_: fault) as server:
        status, counts, manifest, rejects, said = curate(
            capsys, teller, out, server.url, "--timeout", "0.3", "--patience", "0.8"
        )
    assert (status, manifest, counts["unanswered"], counts["rejected"]) == (1, [], 3, {})
    assert all(one["stage"] == "visual" and not one["final"] for one in rejects.values())
    assert "curator: " in said
    with chat_server(teller) as server:
        status, _, manifest, rejects, _ = curate(capsys, teller, out, server.url)
    assert (status, len(manifest), rejects) == (0, 3, {})


def test_a_run_ends_when_nobody_is_answered(teller, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(command, "SILENCE", 2)
    with chat_server(lambda *_: (400, {}, b"no")) as server:
        status, counts, _, _, said = curate(capsys, teller, tmp_path / "out", server.url, "--concurrency", "1")
    assert (status, counts["unanswered"], counts["left"], len(server.requests)) == (1, 2, 1, 2)
    assert "no answer to 2 questions in a row" in said


@pytest.mark.parametrize("status", [401, 403, 404])
def test_a_wrong_key_or_address_is_the_users_mistake(teller, status, tmp_path, capsys):
    with chat_server(lambda *_: (status, {}, b"bad key")) as server:
        ended, _, _, _, said = curate(capsys, teller, tmp_path / "out", server.url)
    assert ended == 2
    assert said.strip().splitlines()[-1].startswith("avocado curate: http")
    assert not (tmp_path / "out" / "manifest.jsonl").exists()


def test_the_key_reaches_the_endpoint_and_nothing_else(teller, tmp_path, capsys, monkeypatch):
    """A server repeats it in errors and in answers."""
    monkeypatch.setenv("MY_KEY", "sk-secret-123")
    few, asked = Teller(teller.truths[:1]), []

    def leaky(stage, truth, answer, attempt):
        asked.append(stage)
        if len(asked) == 1:
            return 500, {}, b"sk-secret-123"
        return "sk-secret-123" if attempt == 1 else answer

    with chat_server(few.but(leaky)) as server:
        status, _, manifest, _, said = curate(capsys, few, tmp_path / "out", server.url, "--key", "MY_KEY")
    assert (status, len(manifest)) == (0, 1)
    assert {request["authorization"] for request in server.requests} == {"Bearer sk-secret-123"}
    assert "sk-secret" not in said + "".join(path.read_text() for path in (tmp_path / "out").iterdir())
    assert not any("sk-secret" in json.dumps(request["messages"]) for request in server.requests)


def test_a_budget_of_calls_is_never_exceeded_over_all_runs(teller, tmp_path, capsys):
    out = tmp_path / "out"
    with chat_server(teller) as server:
        status, counts, manifest, _, said = curate(
            capsys, teller, out, server.url, "--budget-calls", "8", "--concurrency", "1"
        )
        assert (status, len(server.requests), counts["calls"], counts["left"]) == (3, 8, 8, 2)
        assert len(manifest) == 1
        assert "the budget would be exceeded" in said
        status, counts, *_ = curate(capsys, teller, out, server.url, "--budget-calls", "8")
        assert (status, len(server.requests), counts["calls"]) == (3, 8, 8)
        status, counts, manifest, _, _ = curate(capsys, teller, out, server.url, "--budget-calls", "18")
        assert (status, len(server.requests), counts["calls"]) == (0, 18, 18)
    check_truth(manifest, teller.truths, out)


def test_calls_without_an_answer_count_in_the_budget(teller, tmp_path, capsys):
    with chat_server(lambda *_: (400, {}, b"no")) as server:
        for _ in range(2):
            _, counts, *_ = curate(capsys, teller, tmp_path / "out", server.url, "--budget-calls", "3")
            assert (counts["calls"], len(server.requests)) == (3, 3)


def test_a_budget_of_tokens_is_kept_and_the_dry_run_tells_it(teller, tmp_path, capsys):
    """With as many tokens as it is said to take at most, a run ends; with fewer it stops before."""
    out, spent = tmp_path / "out", []

    def counting(number, request):
        text = json.dumps(teller.answer(stage_of(request), teller.truth_of(request)))
        spent.append(module.estimate(request) - 100)
        message = {"message": {"content": text}}
        return json.dumps({"choices": [message], "usage": {"total_tokens": spent[-1]}}).encode()

    with chat_server(counting) as server:
        _, told, *_ = curate(capsys, teller, out, server.url, "--dry-run", "--answer-tokens", "600")
        assert (told["clips"], told["unreadable"], told["calls"], told["calls_at_most"]) == (3, 0, 18, 54)
        assert server.requests == []
        assert not out.exists()
        part = ["--answer-tokens", "600", "--concurrency", "1", "--budget-tokens"]
        status, counts, *_ = curate(capsys, teller, out, server.url, *part, str(told["tokens"] // 2))
        assert status == 3
        assert 0 < counts["tokens"] == sum(spent) <= told["tokens"] // 2
        status, counts, _, _, _ = curate(capsys, teller, out, server.url, *part, str(told["tokens_at_most"]))
        assert status == 0
        assert counts["tokens"] == sum(spent) <= told["tokens_at_most"]


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_and_asks_nothing_again(teller, how, tmp_path, capsys):
    """Only what was on its way when it was killed is asked once more."""
    out, running = tmp_path / "out", []

    def deadly(number, request):
        if number == 9:
            os.kill(running[0].pid, how)
            running[0].wait()
        return teller(number, request)

    with chat_server(deadly) as server:
        videos = [str(truth["path"]) for truth in teller.truths]
        asked = [*videos, "--out", str(out), "--url", server.url, "--model", "m", *QUICK, "--concurrency", "1"]
        running.append(subprocess.Popen([sys.executable, "-m", "avocado_jax", "curate", *asked]))
        assert running[0].wait(300) == (75 if how == signal.SIGTERM else -how)
        assert not (out / "manifest.jsonl").exists()
        with (out / "answers.jsonl").open("ab") as file:
            file.write(b'{"key": "half a li')
        status, counts, manifest, _, _ = curate(capsys, teller, out, server.url)
    assert status == 0
    check_truth(manifest, teller.truths, out)
    bodies = [json.dumps(request["messages"], sort_keys=True) for request in server.requests]
    assert len(bodies) == 19
    assert len(set(bodies)) == 18
    assert bodies.count(bodies[9]) == 2  # it was not answered
    assert counts["calls"] == 18


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such file"),
        (["EMPTY"], "no videos in it"),
        (["CLIP", "CLIP"], "given twice"),
        (["CLIP", "--url", "localhost"], "the curator's URL is 'localhost'"),
        (["CLIP", "--fps", "0"], "--fps is 0.0, more than 0 is asked for"),
        (["CLIP", "--concurrency", "0"], "--concurrency is 0, at least 1"),
        (["CLIP", "--budget-tokens", "-1"], "--budget-tokens is -1, at least 0"),
        (["CLIP", "--request", "[]"], "--request is no JSON object"),
        (["CLIP", "--request", "{"], "--request is not JSON"),
        (["CLIP", "--request", '{"stream": true}'], '--request may not set "stream"'),
        (["CLIP", "--dtype", "float32"], "none is named"),
        (["CLIP", "--checkpoint", "nowhere"], "nowhere"),
        (["CLIP", "--tokenizer", "nowhere"], "nowhere"),
        (["CLIP", "--out", "CLIP"], "is not a folder"),
        (["CLIP", "--out", "TAKEN"], "no line of answers"),
    ],
)
def test_bad_input_is_one_line(teller, arguments, said, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "answers.jsonl").write_text('{"id": "a"}\n')
    named = {"CLIP": str(teller.truths[0]["path"]), "EMPTY": str(tmp_path / "EMPTY"), "TAKEN": str(tmp_path / "TAKEN")}
    given = ["--out", str(tmp_path / "out"), "--url", "http://127.0.0.1:9/v1", "--model", "m"]
    assert main(["curate", *given, *[named.get(one, one) for one in arguments]]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert said in told.err
    assert len(told.err.splitlines()) == 1


def test_bad_files_are_rejected_and_the_others_are_curated(teller, tmp_path, capsys):
    """Folders are searched; files of one name are told apart by their paths."""
    for name, data in (("a/x.mp4", b"not a video"), ("b/x.mp4", b""), ("b/notes.txt", b"not looked at")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    good = teller.truths[0]
    (tmp_path / "b" / "good.mp4").write_bytes(good["path"].read_bytes())
    out = tmp_path / "out"
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    with chat_server(Teller([good])) as server:
        asked = [*folders, "--out", str(out), "--url", server.url, "--model", "m", *QUICK]
        assert main(["curate", *asked]) == 0
    assert json.loads(capsys.readouterr().out)["rejected"] == {"read": 2}
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(one["id"], one["video"], one["stage"]) for one in rejects] == [
        (str(tmp_path / "a" / "x.mp4"), "../a/x.mp4", "read"),
        (str(tmp_path / "b" / "x.mp4"), "../b/x.mp4", "read"),
    ]
    assert "empty (zero bytes)" in rejects[1]["reason"]
    assert json.loads((out / "manifest.jsonl").read_text())["id"] == "good"


def test_more_fields_of_requests(teller, tmp_path, capsys):
    more = '{"max_tokens": null, "max_completion_tokens": 900, "seed": 1}'
    few = Teller(teller.truths[:1])
    with chat_server(few) as server:
        assert curate(capsys, few, tmp_path / "out", server.url, "--request", more)[0] == 0
    for request in server.requests:
        assert (request["max_completion_tokens"], request["seed"], request["temperature"]) == (900, 1, 0)
        assert "max_tokens" not in request
        assert request["response_format"]["type"] == "json_schema"


@pytest.mark.slow
def test_twenty_clips(tmp_path, capsys):
    """An honest server gives the truth back; of one that lies about every other clip, the others are kept."""
    many = Teller(make_clips(tmp_path / "clips", [(index, index % 3) for index in range(20)]))
    with chat_server(many) as server:
        status, _, manifest, rejects, _ = curate(capsys, many, tmp_path / "honest", server.url)
    assert (status, rejects) == (0, {})
    check_truth(manifest, many.truths, tmp_path / "honest")
    lies = dict(zip((truth["id"] for truth in many.truths[::2]), list(FALSE)[:10]))

    def lie(asked, truth, answer, attempt):
        stage, change, _ = FALSE[lies[truth["id"]]] if truth["id"] in lies else ("", None, "")
        return change(truth, answer) if asked == stage.partition(">")[0] else answer

    with chat_server(many.but(lie)) as server:
        status, _, manifest, rejects, _ = curate(capsys, many, tmp_path / "lying", server.url)
    assert status == 0
    check_truth(manifest, many.truths[1::2], tmp_path / "lying")
    assert {name: one["stage"] for name, one in rejects.items()} == {
        name: FALSE[fault][0].rpartition(">")[2] for name, fault in lies.items()
    }
    assert all(FALSE[fault][2] in rejects[name]["reason"] for name, fault in lies.items())


@pytest.mark.slow
def test_a_thinker_at_hand_captions_picture_and_sound(teller, tmp_path, capsys, monkeypatch):
    """The endpoint is asked about texts alone; the model is loaded once, and not at all where all is known."""
    few, out = Teller(teller.truths[:1]), tmp_path / "out"

    def writer(number, request):
        held = json.loads(request["messages"][1]["content"])
        stage = stage_of(request)
        if stage == "fusion":
            assert not any("start" in one for one in held["visual"] + held["audio"])
            return json.dumps({"caption": " ".join(one["text"] for one in held["visual"] + held["audio"])})
        point = {"text": held.get("caption", "").split(".")[0], "dimension": "static"}
        return json.dumps(
            {"completeness": {"score": 4}, "keypoints": {"keypoints": [point]}}.get(stage, {"dialogues": []})
        )

    with chat_server(writer) as server:
        asked = ["--checkpoint", str(shipped_checkpoint())]
        status, counts, manifest, rejects, _ = curate(capsys, few, out, server.url, *asked)
        assert (status, rejects, len(manifest), counts["calls"]) == (0, {}, 1, 4)
        monkeypatch.setattr(command, "load_captioner", None)
        assert curate(capsys, few, out, server.url, *asked)[2] == manifest
    assert len(server.requests) == 4
    assert measure(manifest[0]["caption"], few.truths[0]).recall > 0  # it knows its own question best
    kept = [json.loads(line)["stage"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert kept[:2] == ["local_visual", "local_audio"]

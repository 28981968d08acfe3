"""`curate` against a real server: true captions are kept, false ones are rejected at the right stage."""

import json

import pytest
from chat import chat_server
from clips import write
from curate_runs import QUICK, check_truth, curate
from fake_curator import FakeCurator, make_clips, separate_sentence, stage_of

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.load import shipped_checkpoint
from avocado_jax.cli import curate as command
from avocado_jax.data.sources import open_shards, prepared_reading
from avocado_jax.world.check import measure

pytestmark = pytest.mark.usefixtures("short_pauses")


def test_true_answers_give_true_captions_without_repeated_calls(curator, tmp_path, capsys):
    out = tmp_path / "out"
    with chat_server(curator) as server:
        status, counts, manifest, rejects, _ = curate(capsys, curator, out, server.url)
        assert (status, rejects) == (0, {})
        check_truth(manifest, curator.truths, out)
        assert len(server.requests) == 18
        assert counts["calls"] == 18
        again = curate(capsys, curator, out, server.url)
        assert len(server.requests) == 18
    assert again[:3] == (0, counts, manifest)
    kept = [json.loads(line) for line in (out / "answers.jsonl").read_text().splitlines()]
    assert len(kept) == 18
    assert {one["clip"] for one in kept} == {truth["id"] for truth in curator.truths}


def without(text, caption):
    """The caption without a sentence."""
    assert text in caption
    return caption.replace(text, "").strip()


def swapped(caption):
    """The caption with its last sentence first."""
    *first, last = caption.rstrip(".").split(". ")
    return f"{last}. {'. '.join(first)}."


FALSE = {  # false answer of a stage, the stage that rejects it, and the reason
    "drops a sentence": ("fusion", lambda t, a: {"caption": without(separate_sentence(t), t["caption"])}, "missing"),
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
def test_false_answers_are_rejected_at_the_expected_stage(curator, fault, tmp_path, capsys):
    """One of two clips gets false answers at every attempt and is rejected; the other is kept."""
    where, change, why = FALSE[fault]
    stage, _, rejected_at = where.partition(">")
    few = FakeCurator(curator.truths[:2])
    bad, good = few.truths

    def lie(current_stage, truth, answer, attempt):
        return change(truth, answer) if (current_stage, truth) == (stage, bad) else answer

    with chat_server(few.but(lie)) as server:
        status, counts, manifest, rejects, _ = curate(capsys, few, tmp_path / "out", server.url)
    assert status == 0
    check_truth(manifest, [good], tmp_path / "out")
    (reject,) = rejects.values()
    assert (reject["id"], reject["stage"], reject["final"]) == (bad["id"], rejected_at or stage, True)
    assert why in reject["reason"]
    current_stage = [stage_of(request) for request in server.requests].count(stage)
    assert current_stage == (2 if fault == "finds it incomplete" else 1 + 3)
    assert counts["rejected"] == {rejected_at or stage: 1}


def test_answers_corrected_on_retry_are_kept(curator, tmp_path, capsys):
    """The first answer of every stage is wrong in a different way, and the retry names the fault."""
    few = FakeCurator(curator.truths[:1])
    wrong = {
        "visual": '```json\n{"sentences": [{"start": "0", "text": "A"}]}\n```',
        "audio": "I hear nothing.",
        "fusion": {"caption": without(separate_sentence(few.truths[0]), few.truths[0]["caption"])},
        "completeness": {"score": True},
        "keypoints": "",
        "dialogues": '{"dialogues": [{"speaker": "the',
    }
    with chat_server(few.but(lambda stage, _, answer, attempt: wrong[stage] if attempt == 1 else answer)) as server:
        status, counts, manifest, _, _ = curate(capsys, few, tmp_path / "out", server.url)
    assert (status, counts["calls"]) == (0, 12)
    check_truth(manifest, few.truths, tmp_path / "out")
    corrections = [request["messages"][3]["content"] for request in server.requests if len(request["messages"]) == 4]
    assert len(corrections) == 6
    assert any("missing: «" + separate_sentence(few.truths[0]) in words for words in corrections)


def test_filters_on_length_cost_no_more_calls(curator, tmp_path, capsys):
    with chat_server(curator) as server:
        _, _, _, rejects, _ = curate(capsys, curator, tmp_path / "long", server.url, "--most-tokens", "20")
        assert {stage_of(request) for request in server.requests} == {"visual", "audio"}
        _, _, _, short, _ = curate(capsys, curator, tmp_path / "short", server.url, "--fewest-tokens", "2000")
    assert {reject["stage"] for reject in rejects.values()} == {one["stage"] for one in short.values()} == {"length"}
    assert all("the maximum is 20" in reject["reason"] for reject in rejects.values())
    assert all("the minimum is 2000" in one["reason"] for one in short.values())
    assert "completeness" not in {stage_of(request) for request in server.requests}


def test_silent_clip_has_a_visual_caption_only(tmp_path, capsys):
    """No request is made about its sound."""
    path = write(tmp_path / "12:30 ä.mp4", sound=None)
    answers = {
        "visual": {"sentences": [{"start": 0.5, "text": "A white square moves over four coloured quarters."}]},
        "keypoints": {"keypoints": [{"text": "A white square moves.", "dimension": "dynamic"}]},
    }
    options = ["--url", "URL", "--model", "m", "--json", "--fewest-tokens", "1"]
    with chat_server(lambda _, request: json.dumps(answers[stage_of(request)])) as server:
        options[1] = server.url
        assert main(["curate", str(tmp_path), "--out", str(tmp_path / "out"), *options]) == 0
    assert len(server.requests) == 2
    line = json.loads((tmp_path / "out" / "manifest.jsonl").read_text())
    assert line == {
        "id": "12:30 ä",
        "video": "../12:30 ä.mp4",
        "caption": "A white square moves over four coloured quarters.",
        "dialogues": [],
        "keypoints": answers["keypoints"]["keypoints"],
    }
    assert path.exists()
    capsys.readouterr()


def test_prepare_reads_the_manifest(curator, tmp_path, capsys):
    """Training rows have the curated fields."""
    with chat_server(curator) as server:
        _, _, manifest, _, _ = curate(capsys, curator, tmp_path / "out", server.url)
    options = ["--workers", "1", "--reading", "fewest_pixels=12544", "--reading", "asked_pixels=12544", "--json"]
    assert main(["prepare", str(tmp_path / "out" / "manifest.jsonl"), str(tmp_path / "shards"), *options]) == 0
    assert json.loads(capsys.readouterr().out)["records"] == 3
    source = open_shards(str(tmp_path / "shards"), prepared_reading(str(tmp_path / "shards")))
    for number, line in enumerate(manifest):
        fields = source[number].fields
        assert fields == {name: value for name, value in line.items() if name != "video"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.mp4"], "nowhere.mp4: no such file"),
        (["EMPTY"], "no videos in it"),
        (["CLIP", "CLIP"], "given twice"),
        (["CLIP", "--url", "localhost"], "the curator's URL is 'localhost'"),
        (["CLIP", "--fps", "0"], "--fps is 0.0, must be more than 0"),
        (["CLIP", "--concurrency", "0"], "--concurrency is 0, must be at least 1"),
        (["CLIP", "--budget-tokens", "-1"], "--budget-tokens is -1, must be at least 0"),
        (["CLIP", "--request", "[]"], "--request is not a JSON object"),
        (["CLIP", "--request", "{"], "--request is not JSON"),
        (["CLIP", "--request", '{"stream": true}'], '--request may not set "stream"'),
        (["CLIP", "--dtype", "float32"], "--dtype needs --checkpoint"),
        (["CLIP", "--checkpoint", "nowhere"], "nowhere"),
        (["CLIP", "--tokenizer", "nowhere"], "nowhere"),
        (["CLIP", "--out", "CLIP"], "is not a folder"),
        (["CLIP", "--out", "TAKEN"], "no line of answers"),
    ],
)
def test_invalid_input_is_a_one_line_error(curator, arguments, message, tmp_path, capsys):
    (tmp_path / "EMPTY").mkdir()
    (tmp_path / "TAKEN").mkdir()
    (tmp_path / "TAKEN" / "answers.jsonl").write_text('{"id": "a"}\n')
    named = {"CLIP": str(curator.truths[0]["path"]), "EMPTY": str(tmp_path / "EMPTY"), "TAKEN": str(tmp_path / "TAKEN")}
    given = ["--out", str(tmp_path / "out"), "--url", "http://127.0.0.1:9/v1", "--model", "m"]
    assert main(["curate", *given, *[named.get(argument, argument) for argument in arguments]]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert len(captured.err.splitlines()) == 1


def test_bad_files_are_rejected_and_the_others_are_curated(curator, tmp_path, capsys):
    """Folders are searched recursively; files of one name are distinguished by their paths."""
    for name, data in (("a/x.mp4", b"not a video"), ("b/x.mp4", b""), ("b/notes.txt", b"not looked at")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    good = curator.truths[0]
    (tmp_path / "b" / "good.mp4").write_bytes(good["path"].read_bytes())
    out = tmp_path / "out"
    folders = [str(tmp_path / "a"), str(tmp_path / "b")]
    with chat_server(FakeCurator([good])) as server:
        options = [*folders, "--out", str(out), "--url", server.url, "--model", "m", *QUICK]
        assert main(["curate", *options]) == 0
    assert json.loads(capsys.readouterr().out)["rejected"] == {"read": 2}
    rejects = [json.loads(line) for line in (out / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["id"], reject["video"], reject["stage"]) for reject in rejects] == [
        (str(tmp_path / "a" / "x.mp4"), "../a/x.mp4", "read"),
        (str(tmp_path / "b" / "x.mp4"), "../b/x.mp4", "read"),
    ]
    assert "empty (zero bytes)" in rejects[1]["reason"]
    assert json.loads((out / "manifest.jsonl").read_text())["id"] == "good"


@pytest.mark.slow
def test_curate_twenty_clips(tmp_path, capsys):
    """An honest server gives the truth. With false answers for every other clip, the others are kept."""
    many = FakeCurator(make_clips(tmp_path / "clips", [(index, index % 3) for index in range(20)]))
    with chat_server(many) as server:
        status, _, manifest, rejects, _ = curate(capsys, many, tmp_path / "honest", server.url)
    assert (status, rejects) == (0, {})
    check_truth(manifest, many.truths, tmp_path / "honest")
    lies = dict(zip((truth["id"] for truth in many.truths[::2]), list(FALSE)[:10]))

    def lie(current_stage, truth, answer, attempt):
        stage, change, _ = FALSE[lies[truth["id"]]] if truth["id"] in lies else ("", None, "")
        return change(truth, answer) if current_stage == stage.partition(">")[0] else answer

    with chat_server(many.but(lie)) as server:
        status, _, manifest, rejects, _ = curate(capsys, many, tmp_path / "lying", server.url)
    assert status == 0
    check_truth(manifest, many.truths[1::2], tmp_path / "lying")
    assert {name: one["stage"] for name, one in rejects.items()} == {
        name: FALSE[fault][0].rpartition(">")[2] for name, fault in lies.items()
    }
    assert all(FALSE[fault][2] in rejects[name]["reason"] for name, fault in lies.items())


@pytest.mark.slow
def test_local_checkpoint_captions_picture_and_sound(curator, tmp_path, capsys, monkeypatch):
    """The endpoint receives text questions only. The model is loaded once, and not if all answers are cached."""
    few, out = FakeCurator(curator.truths[:1]), tmp_path / "out"

    def writer(number, request):
        texts = json.loads(request["messages"][1]["content"])
        stage = stage_of(request)
        if stage == "fusion":
            assert not any("start" in one for one in texts["visual"] + texts["audio"])
            return json.dumps({"caption": " ".join(one["text"] for one in texts["visual"] + texts["audio"])})
        point = {"text": texts.get("caption", "").split(".")[0], "dimension": "static"}
        return json.dumps(
            {"completeness": {"score": 4}, "keypoints": {"keypoints": [point]}}.get(stage, {"dialogues": []})
        )

    with chat_server(writer) as server:
        options = ["--checkpoint", str(shipped_checkpoint())]
        status, counts, manifest, rejects, _ = curate(capsys, few, out, server.url, *options)
        assert (status, rejects, len(manifest), counts["calls"]) == (0, {}, 1, 4)
        monkeypatch.setattr(command, "load_captioner", None)
        assert curate(capsys, few, out, server.url, *options)[2] == manifest
    assert len(server.requests) == 4
    assert measure(manifest[0]["caption"], few.truths[0]).recall > 0  # its own question works best
    kept = [json.loads(line)["stage"] for line in (out / "answers.jsonl").read_text().splitlines()]
    assert kept[:2] == ["local_visual", "local_audio"]

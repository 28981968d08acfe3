"""`avocado score`: captions in, scores out."""

import json
import math

import pytest
from chat import chat_server
from tokenizer import write_tokenizer

from avocado_jax.__main__ import main
from avocado_jax.cli.score import manifest_lines, with_reference
from avocado_jax.errors import InputError
from avocado_jax.eval.metrics import collapses
from avocado_jax.world.check import measure
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

NAMES = ["id", "R_C", "R_D", "R_L", "repcol", "keypoints", "truncated"]


@pytest.fixture
def scored(tmp_path, capsys):
    def run(lines, *more):
        file = tmp_path / "captions.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
        status = main(["score", str(file), *more])
        out, err = capsys.readouterr()
        return status, out.splitlines(), err.splitlines()

    return run


@pytest.mark.slow
def test_scores_are_printed_in_order(tmp_path, scored):
    records = [record(make_script(4, index), 2) for index in range(3)]
    full = [
        {
            "id": one["id"],
            "caption": one["references"][1],
            "reference": {name: one[name] for name in ("dialogues", "keypoints")},
        }
        for one in records
    ]
    caption = records[0]["caption"]
    lines = [
        *full,
        {"id": "itself", "caption": caption, "reference": {"caption": caption, "keypoints": ["A cow."]}},
        {"id": "loop", "caption": "ha " * 6000, "reference": {}},
        {"id": "nothing", "caption": "", "reference": {"dialogues": [], "keypoints": [{"text": "A cow."}]}},
    ]
    folder = write_tokenizer(tmp_path / "qwen", small=True)
    status, out, err = scored(lines, "--tokenizer", str(folder), "--json")
    found = [json.loads(line) for line in out]
    assert status == 0
    assert [one["id"] for one in found] == [line["id"] for line in lines]
    assert all(list(one) == NAMES for one in found)
    for one, of, fields in zip(found, full, records):
        assert one["R_D"] == pytest.approx(measure(of["caption"], fields).dialogue_f1, abs=1e-6)
        assert one["R_C"] == pytest.approx(sum(one["keypoints"]) / len(fields["keypoints"]), abs=1e-6)
        assert one["R_L"] == 1
        assert one["repcol"] is collapses(of["caption"])
    itself, loop, nothing = found[3:]
    assert (itself["R_D"], itself["R_C"], itself["keypoints"]) == (1, 0, [0])
    assert (loop["R_C"], loop["R_D"], loop["keypoints"], loop["R_L"], loop["repcol"]) == (None, None, None, 0, True)
    assert (nothing["R_C"], nothing["R_D"], nothing["repcol"]) == (0, 1, False)
    assert not any(one["truncated"] for one in found)
    assert any("dialogue: no reference for 1 of 6" in line for line in err)


def test_explain_describes_the_matches(scored, monkeypatch):
    cached = []
    monkeypatch.setattr("avocado_jax.cli.score.use_user_cache", lambda: cached.append(True))
    caption = 'The red circle says, "Look at the moon." A bell rings softly.'
    dialogues = [{"speaker": "a red circle", "text": "Look at the moon!"}, {"speaker": "x", "text": "Good bye"}]
    reference = {"dialogues": dialogues, "keypoints": [{"text": "A bell rings softly.", "dimension": "auditory"}]}
    line = {"id": "a", "caption": caption, "reference": reference}
    status, out, _ = scored([line], "--terms", "dialogue,checklist", "--json", "--explain")
    scores = json.loads(out[0])
    assert status == 0
    assert scores["R_L"] is None
    assert scores["R_D"] == pytest.approx(2 / 3, abs=1e-6)
    assert (
        'Line 1 as "Look at the moon.": similarity 1.00, the same speaker: "red circle" for "a red circle".'
        in scores["explain"]
    )
    assert 'Not said, line 2: "Good bye".' in scores["explain"]
    assert any("A bell rings softly" in one and "1.00" in one for one in scores["explain"])
    assert cached


@pytest.mark.slow
def test_timing_and_probes_are_separate_fields(scored):
    """They are optional; `null` without a reference, which is reported."""
    events = [{"start": 0, "end": 2}, {"start": 2, "end": 4.5}]
    probe = {"question": "What rings?", "choices": ["a bell", "a horn"], "answer": "a bell"}
    lines = [
        {"id": "a", "caption": "[0 - 2] A bell. [00:02 - 00:04.5] A horn.", "reference": {"events": events}},
        {"id": "b", "caption": "Now a bell rings.", "reference": {"events": events, "probes": [probe, probe]}},
        {"id": "c", "caption": "[0 - 2] A horn rings.", "reference": {"probes": [probe]}},
    ]
    with chat_server() as server:
        judge = ["--judge", "remote", "--judge-model", "m", "--judge-url", server.url]
        status, out, err = scored(lines, "--terms", "timing,probes", *judge, "--json", "--explain")
    found = [json.loads(one) for one in out]
    assert (status, len(server.requests)) == (0, 2)
    assert [list(one)[:-1] for one in found] == [[*NAMES, "timing", "probes"]] * 3
    assert [one["timing"] for one in found] == [pytest.approx(1, abs=1e-6), 0, None]
    assert [one["probes"] for one in found] == [None, 1, 0]
    assert "Time IoU of the scenes 1.00." in found[0]["explain"]
    assert "Probes answered rightly 0.00." in found[2]["explain"]
    assert any("timing: no reference for 1 of 3 captions, such as c" in line for line in err)
    assert any("probes: no reference for 1 of 3 captions, such as a" in line for line in err)


def shout(caption, reference):
    """A device term."""
    return (caption.points == ord("!")).sum() / 1.0


def known(captions, references):
    """A host term."""
    return [len(reference["keypoints"] or ()) or None for reference in references]


def too_few(captions, references):
    """A term that returns too few values."""
    return [1.0] * (len(captions) - 1)


def confused(captions, references):
    """A term that raises an input error."""
    raise InputError("no such caption")


def test_users_terms_and_word_weights(scored, tmp_path):
    (tmp_path / "idf.jsonl").write_text("".join(json.dumps({"caption": f"A dog {k} barks."}) + "\n" for k in range(40)))
    lines = [
        {"id": "a", "caption": "A dog sleeps! Now!", "reference": {"keypoints": ["A dog sits."]}},
        {"id": "b", "caption": "Nothing.", "reference": {}},
    ]
    terms = ["--extra", "jax:test_score_command:shout", "--extra", "host:test_score_command:known", "--json"]
    status, out, _ = scored(lines, *terms)
    first, second = map(json.loads, out)
    assert status == 0
    assert (first["shout"], first["known"], second["shout"], second["known"]) == (2, 1, 0, None)
    _, out, _ = scored(lines, *terms, "--idf", str(tmp_path / "idf.jsonl"))
    assert json.loads(out[0])["R_C"] < first["R_C"]  # "dog" has little weight among captions of dogs
    _, out, _ = scored(lines, *terms[:-1])
    assert "shout 2.000  known 1.000" in out[0]
    for wrong in ("jax:no_module:name", "jax::f", "host:.m:f", "host:test_score_command:known=x", "host:math:dist=inf"):
        status, _, err = scored(lines, "--extra", wrong)
        assert (status, len(err)) == (2, 1), wrong
    for wrong, why in {"too_few": "got 1 values for 2 captions", "confused": "no such caption"}.items():
        status, _, err = scored(lines, "--extra", f"host:test_score_command:{wrong}")
        assert (status, err[0]) == (3, "Traceback (most recent call last):")
        assert err[-1].startswith(
            f"avocado score: RuntimeError: the term host:test_score_command:{wrong} failed: {why}"
        )


def test_references_are_read_from_a_manifest(tmp_path):
    """By id or by the name of the video, unless two videos have this name. References of a line take precedence."""
    clips = [
        {"id": str(number), "video": video, "caption": f"Caption {number}."}
        for number, video in enumerate(("x/a.mp4", "x/b.mp4", "y/b.mp4", "0.mp4"))
    ]
    file = tmp_path / "clips.jsonl"
    file.write_text("".join(json.dumps(clip) + "\n" for clip in clips))
    known = manifest_lines(file)
    found = {name: with_reference({"id": name}, known).get("reference") for name in ("/m/a.mp4", "2", "b.mp4", "c.mp4")}
    assert found == {"/m/a.mp4": clips[0], "2": clips[2], "b.mp4": None, "c.mp4": None}
    assert with_reference({"id": "0"}, known)["reference"] == clips[0]  # ids take precedence
    assert with_reference({"id": "0", "reference": {}}, known)["reference"] == {}


def test_invalid_unicode_is_scored(scored):
    """A lone surrogate, from tools that split an emoji."""
    broken = "Hi \ud83d."
    caption, dialogues = f'A man says, "{broken}"', [{"speaker": "man", "text": broken}]
    reference = {"caption": caption, "dialogues": dialogues, "keypoints": [f"A man says {broken}"]}
    status, out, _ = scored([{"id": "a", "caption": caption, "reference": reference}], "--explain")
    assert status == 0
    assert out[0].startswith("a  R_C 1.000  R_D 1.000  R_L unknown")
    assert len(out) > 1


@pytest.mark.parametrize(
    ("line", "more", "complaint"),
    [
        ({"id": "a"}, [], '"caption" must be a string'),
        ({"id": "a", "caption": "x", "reference": []}, ["--terms", "size"], 'no term "size"'),
        ({"id": "a", "caption": "x", "reference": {"dialogues": "x"}}, [], '"reference.dialogues" must be a list'),
        ({"id": "a", "caption": "x", "reference": {"keypoints": [3]}}, [], "must have text"),
        ({"id": "a", "caption": "x", "reference": 3}, [], '"reference" must be an object'),
        ({"id": "a", "caption": "x", "reference": {"events": [{"start": 1}]}}, [], "must have start and end"),
        ({"id": "a", "caption": "x", "reference": {"events": [{"start": 1, "end": math.nan}]}}, [], "start and end"),
        ({"id": "a", "caption": "x", "reference": {"probes": 3}}, [], '"reference.probes" must be a list'),
        ({"id": "a", "caption": "x", "reference": {"probes": [{}]}}, [], "captions.jsonl:1: a probe's 'question'"),
        ({"id": "a", "caption": "x"}, ["--terms", "probes"], "--judge lexical is not one of lm, remote"),
    ],
)
def test_invalid_input_is_a_one_line_error(scored, line, more, complaint):
    status, out, err = scored([line], *more)
    assert (status, out) == (2, [])
    assert len(err) == 1
    assert complaint in err[0]

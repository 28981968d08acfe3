"""`avocado score`: captions in, scores out."""

import json

import pytest
from tokenizer import write_tokenizer

from avocado_jax.__main__ import main
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
def test_scores_in_order(tmp_path, scored):
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
    for one, of, own in zip(found, full, records):
        assert one["R_D"] == pytest.approx(measure(of["caption"], own).dialogue_f1, abs=1e-6)
        assert one["R_C"] == pytest.approx(sum(one["keypoints"]) / len(own["keypoints"]), abs=1e-6)
        assert one["R_L"] == 1
        assert one["repcol"] is collapses(of["caption"])
    itself, loop, nothing = found[3:]
    assert (itself["R_D"], itself["R_C"], itself["keypoints"]) == (1, 0, [0])
    assert (loop["R_C"], loop["R_D"], loop["keypoints"], loop["R_L"], loop["repcol"]) == (None, None, None, 0, True)
    assert (nothing["R_C"], nothing["R_D"], nothing["repcol"]) == (0, 1, False)
    assert not any(one["truncated"] for one in found)
    assert any("dialogue: no reference for 1 of 6" in line for line in err)


def test_what_matched_is_told_in_words(scored):
    caption = 'The red circle says, "Look at the moon." A bell rings softly.'
    dialogues = [{"speaker": "a red circle", "text": "Look at the moon!"}, {"speaker": "x", "text": "Good bye"}]
    reference = {"dialogues": dialogues, "keypoints": [{"text": "A bell rings softly.", "dimension": "auditory"}]}
    line = {"id": "a", "caption": caption, "reference": reference}
    status, out, _ = scored([line], "--terms", "dialogue,checklist", "--json", "--explain")
    told = json.loads(out[0])
    assert status == 0
    assert told["R_L"] is None
    assert told["R_D"] == pytest.approx(2 / 3, abs=1e-6)
    assert 'Line 1 as "Look at the moon.": similarity 1.00, the same speaker.' in told["explain"]
    assert 'Not said, line 2: "goodbye".' in told["explain"]
    assert any("A bell rings softly" in one and "1.00" in one for one in told["explain"])


@pytest.mark.parametrize(
    ("line", "more", "complaint"),
    [
        ({"id": "a"}, [], '"caption" must be a string'),
        ({"id": "a", "caption": "x", "reference": []}, ["--terms", "size"], 'no term "size"'),
        ({"id": "a", "caption": "x", "reference": {"dialogues": "x"}}, [], '"reference.dialogues" must be a list'),
        ({"id": "a", "caption": "x", "reference": {"keypoints": [3]}}, [], "must have text"),
        ({"id": "a", "caption": "x", "reference": 3}, [], '"reference" must be an object'),
    ],
)
def test_bad_input_is_one_line(scored, line, more, complaint):
    status, out, err = scored([line], *more)
    assert (status, out) == (2, [])
    assert len(err) == 1
    assert complaint in err[0]

"""`evaluate world` with a random model: from clips to metrics, kills, stops and invalid input."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from evaluate_runs import CLIPS, OPTIONS, evaluate
from safetensors.numpy import load_file, save_file

from avocado_jax.__main__ import main
from avocado_jax.checkpoint import load
from avocado_jax.eval import runner
from avocado_jax.eval.captioner import load_captioner
from avocado_jax.eval.local_judge import LocalJudge
from avocado_jax.sampling.engine import Engine

# The command, killed by SIGKILL at its second batch.
KILLED = """
import os, signal, sys
from avocado_jax.__main__ import main
from avocado_jax.eval import runner
class Killed(runner.Engine):
    def run(self, requests):
        for number, made in enumerate(super().run(requests)):
            if number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield made
runner.Engine = Killed
main(sys.argv[1:])
"""


def read_captions(world):
    (file,) = world.glob("captions-*.jsonl")
    return file, {line["id"]: line for line in map(json.loads, file.read_text().splitlines())}


def test_evaluate_from_clips_to_metrics(world, checkpoint, capsys, monkeypatch):
    result, _ = evaluate(capsys, world, "--checkpoint", checkpoint)
    assert list(result) == ["metrics", "n"]
    names = ["event_recall", "hallucination", "order", "dialogue_f1", "repcol", "length"]
    assert list(result["metrics"]) == names
    assert result["n"] == CLIPS
    assert result["metrics"]["event_recall"] == 0
    assert result["metrics"]["hallucination"] == 1
    file, captions = read_captions(world)
    lengths = [line["tokens"] for line in captions.values()]
    assert result["metrics"]["length"] == sum(lengths) / CLIPS
    assert len(captions) == CLIPS

    # All captions exist: no model is loaded. The file can be passed to --captions, also elsewhere.
    monkeypatch.setattr("avocado_jax.cli.evaluate_captions.load_captioner", None)
    assert evaluate(capsys, world, "--checkpoint", checkpoint)[0] == result
    assert evaluate(capsys, world, "--captions", file)[0] == result
    assert evaluate(capsys, world, "--checkpoint", checkpoint, "--limit", 3)[0]["n"] == 3
    monkeypatch.setattr(load, "SHIPPED", checkpoint)
    assert evaluate(capsys, world)[0] == result


def test_captions_do_not_depend_on_the_batch(world, checkpoint, capsys, tmp_path):
    evaluate(capsys, world, "--checkpoint", checkpoint)
    _, together = read_captions(world)
    for name, more in {"alone": [], "blind": ["--no-picture"]}.items():
        out = tmp_path / f"{name}.jsonl"
        evaluate(capsys, world, "--checkpoint", checkpoint, "--limit", 1, "--out", out, *more)
        (made,) = map(json.loads, out.read_text().splitlines())
        assert (made == together[made["id"]]) == (name == "alone")


def test_no_audio_and_no_picture_remove_their_input(world, checkpoint, monkeypatch):
    """Inputs of the model for each clip, and the number of slots. A late failure fails its clip only."""
    captioner = load_captioner(load.open_checkpoint(checkpoint), "What?", "float32")
    lines = [json.loads(line) for line in (world / "clips.jsonl").read_text().splitlines()]
    items = [runner.Item(one["id"], str(world / one["video"]), {"prompt": "Which?" * i}) for i, one in enumerate(lines)]
    rows = {}

    class Fake(Engine):
        def run(self, requests):
            assert (self.length, self._slots) == (9, 2)
            for number, (item, row, _) in enumerate(requests):
                rows[item.id] = row
                yield item, MemoryError() if number == 1 else np.array([72, 73, 258], np.int32)

    monkeypatch.setattr(runner, "Engine", Fake)
    for how in (
        runner.CaptionOptions(9, "float32"),
        runner.CaptionOptions(9, "float32", sound=False),
        runner.CaptionOptions(9, "float32", True, False),
    ):
        made = {item.id: caption for item, caption in runner._captioned(captioner, items, how, 2, 60.0)}
        assert list(made) == [item.id for item in items]
        assert isinstance(made.pop(items[1].id), MemoryError)
        assert set(made.values()) == {runner.Caption("ij", 2)}
        for row in rows.values():
            assert bool(len(row.clip.mel)) == how.sound
            assert (row.clip.patches[:, row.clip.patch_valid] == runner.GREY).all() == (not how.picture)


def test_killed_evaluation_resumes_to_the_same_result(world, checkpoint, capsys, tmp_path):
    result, _ = evaluate(capsys, world, "--checkpoint", checkpoint)
    file, undisturbed = read_captions(world)
    file.unlink()
    command = ["evaluate", "world", "--data", str(world / "clips.jsonl"), "--checkpoint", str(checkpoint), *OPTIONS]
    run = subprocess.run([sys.executable, "-c", KILLED, *command], capture_output=True, check=False, timeout=300)
    assert (run.returncode, run.stdout) == (-signal.SIGKILL, b""), run.stderr
    before = file.read_bytes()
    assert before.count(b"\n") == 2
    file.write_bytes(before + b'{"id": "half a li')  # as a kill in the middle of a write leaves it
    again, errors = evaluate(capsys, world, "--checkpoint", checkpoint)
    assert again == result
    assert f"2 of {CLIPS} are in {file} already" in errors
    assert file.read_bytes().startswith(before)
    assert read_captions(world)[1] == undisturbed


def test_captions_of_another_checkpoint_or_question_are_not_reused(world, checkpoint, tmp_path):
    items = [runner.Item("a", str(world / "clips.jsonl"), {"prompt": text}) for text in ("What?", "Who?")]
    hows = [
        runner.CaptionOptions(5, "float32"),
        runner.CaptionOptions(6, "float32"),
        runner.CaptionOptions(5, "bfloat16"),
    ]
    keys = {runner.caption_key(item, name, how) for item in items for name in "xy" for how in hows}
    assert len(keys) == 12
    opened = load.open_checkpoint(checkpoint)
    known = load.identity(opened)
    generation_config = checkpoint / "generation_config.json"
    generation_config.write_text('{"eos_token_id": 258}')
    assert load.identity(opened) != known
    generation_config.unlink()
    assert load.identity(opened) == known
    runs = []
    for name in ("one", "two"):
        assert main(["convert", "from-hf", str(checkpoint), str(tmp_path / name)]) == 0
        runs.append(load.identity(load.named_checkpoint(str(tmp_path / name))))
        assert load.identity(load.named_checkpoint(str(tmp_path / name))) == runs[-1]
    assert len({known, *runs}) == 3


def test_failed_clips_are_listed_and_too_many_stop_the_run(world, world_clips, checkpoint, capsys):
    clips = sorted((world_clips / "clips").iterdir())
    (world / "clips").unlink()
    (world / "clips").mkdir()
    for clip in clips[:-1]:
        (world / "clips" / clip.name).symlink_to(clip)
    (world / "clips" / clips[-1].name).write_bytes(b"")
    _, errors = evaluate(capsys, world, "--checkpoint", checkpoint, status=3)
    assert "is empty (zero bytes)" in errors
    assert f"1 of {CLIPS} clips failed" in errors
    result, errors = evaluate(capsys, world, "--checkpoint", checkpoint, "--max-failed", 0.2)
    assert (result["n"], result["failed"]) == (CLIPS, [clips[-1].stem])
    assert "is empty (zero bytes)" in errors
    assert result["metrics"]["length"] == sum(line["tokens"] for line in read_captions(world)[1].values()) / CLIPS
    (world / "clips" / clips[-1].name).unlink()
    (world / "clips" / clips[-1].name).symlink_to(clips[-1])
    assert "failed" not in evaluate(capsys, world, "--checkpoint", checkpoint)[0]  # it is retried


def test_clip_past_its_timeout_fails(world, checkpoint, capsys):
    _, errors = evaluate(capsys, world, "--checkpoint", checkpoint, "--clip-seconds", "1e-6", status=3)
    assert "took longer than 1e-06 s" in errors


def test_evaluate_captions_of_other_tools(world, checkpoint, capsys, tmp_path):
    records = [json.loads(line) for line in (world / "clips.jsonl").read_text().splitlines()]
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(json.dumps({"id": r["id"], "caption": r["caption"]}) for r in records))
    perfect = {"event_recall": 1, "hallucination": 0, "order": 1, "dialogue_f1": 1, "repcol": 0, "length": None}
    assert evaluate(capsys, world, "--captions", file)[0] == {"metrics": perfect, "n": CLIPS}
    lines = "".join(json.dumps({"clip": r["id"], "caption": r["caption"]}) + "\n" for r in records)
    (tmp_path / "captions-0-of-1.jsonl").write_text(lines)  # as `avocado caption --manifest` writes them
    assert evaluate(capsys, world, "--captions", tmp_path / "captions-0-of-1.jsonl")[0]["metrics"] == perfect
    result, _ = evaluate(capsys, world, "--captions", file, "--checkpoint", checkpoint)
    assert result["metrics"]["length"] == sum(len(r["caption"].encode()) for r in records) / CLIPS  # one byte per token
    file.write_text("\n".join(json.dumps({"id": r["id"], "caption": r["caption"]}) for r in records[1:]))
    assert f"no caption of 1 of {CLIPS} clips" in evaluate(capsys, world, "--captions", file, status=3)[1]
    result, _ = evaluate(capsys, world, "--captions", file, "--max-failed", 0.2)
    assert result["metrics"]["event_recall"] == pytest.approx(1 - 1 / CLIPS)
    assert result["failed"] == [records[0]["id"]]
    assert main(["evaluate", "world", "--data", str(world / "clips.jsonl"), "--captions", str(file), "--limit", "1",
                 "--max-failed", "1"]) == 0  # fmt: skip
    table = dict(line.split() for line in capsys.readouterr().out.splitlines())
    assert (table["event_recall"], table["length"], table["n"]) == ("0.000", "0.000", "1")


def test_invalid_input_is_a_one_line_error(world, checkpoint, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(load, "SHIPPED", tmp_path / "none")
    data, model = str(world / "clips.jsonl"), ["--checkpoint", str(checkpoint)]
    good = json.loads((world / "clips.jsonl").read_text().splitlines()[0])

    def file(name, *lines):
        (tmp_path / name).write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
        return str(tmp_path / name)

    caption = {"id": good["id"], "caption": "x"}
    tour = [
        ([data], "name one with --checkpoint"),
        ([data, "--checkpoint", "nowhere"], "nowhere: no such folder"),
        (["no.jsonl", *model], "no.jsonl: No such file"),
        ([file("a.jsonl", {**good, "video": 3}), *model], '"video" must be a string'),
        ([file("p.jsonl", {**good, "prompt": 3}), *model], "its 'prompt' is not a text"),
        ([file("b.jsonl", good), *model], "no such file, nor any other video"),
        ([file("c.jsonl", good, good), *model], "a second clip"),
        ([file("d.jsonl", {**good, "events": [{"text": "It rains.", "start": 0}]}), *model], "not in the language"),
        ([data, "--captions", file("e.jsonl", {"id": "x", "caption": "x"})], 'have no clip "x"'),
        ([data, "--captions", file("f.jsonl", caption, caption)], "f.jsonl:2: a second caption"),
        ([data, "--captions", file("g.jsonl", "{")], "g.jsonl:1: not JSON"),
        ([data, "--captions", "no.jsonl"], "no.jsonl: No such file"),
        ([data, "--captions", "no.jsonl", "--out", "x"], "--out and --captions exclude"),
        ([data, *model, "--batch", "0"], "--batch is 0"),
        ([data, *model, "--limit", "0"], "--limit is 0"),
        ([data, *model, "--max-new-tokens", "-1"], "--max-new-tokens is -1"),
        ([data, *model, "--max-failed", "2"], "--max-failed is 2.0"),
        ([data, *model, "--out", str(tmp_path)], "Is a directory"),
        ([data, *model, "--out", file("h.jsonl", "other", "")], "h.jsonl:1: not JSON"),
    ]
    for (clips, *rest), message in tour:
        status = main(["evaluate", "world", "--data", clips, *rest])
        captured = capsys.readouterr()
        assert status == 2, rest
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert captured.out == ""
    for wrong in (["everything", "--data", data], ["world"]):
        with pytest.raises(SystemExit, match="2"):
            main(["evaluate", *wrong])
    capsys.readouterr()
    reading = checkpoint / "reading.json"
    original = reading.read_text()
    for text, message in (("{", "not JSON"), ('{"fsp": 2}', "no property 'fsp'"), ('{"fps": -1}', "fps is -1")):
        reading.write_text(text)
        assert main(["evaluate", "world", "--data", data, *model, "--out", str(tmp_path / "x.jsonl")]) == 2
        assert message in capsys.readouterr().err
    reading.write_text(original)


ANSWER, SAYS = '{"answer": "A"}', 266  # the first id that the tokenizer leaves free


def write_constant_checkpoint(checkpoint, folder):
    """A checkpoint that always answers A: all layers are zero, and each token has a fixed successor."""
    shutil.copytree(checkpoint, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    tokenizer["added_tokens"].append({"id": SAYS, "content": ANSWER, **plain})
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    line_end = tokenizer["model"]["vocab"]["\u010a"]
    stop = next(token["id"] for token in tokenizer["added_tokens"] if token["content"] == "<|im_end|>")
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                tensor[:] = 0
            if name.endswith("model.norm.weight"):
                tensor[:] = 1
        known = {name: tensor for name, tensor in tensors.items() if "embed_tokens" in name or "lm_head" in name}
        for name, head in known.items():
            if "lm_head" in name:
                embedding = next(tensor for other, tensor in known.items() if "embed_tokens" in other)
                head[:] = 0
                head[SAYS], head[stop] = 9 * embedding[line_end], 9 * embedding[SAYS]
        save_file(tensors, file, {"format": "pt"})
    return folder


def test_public_benchmark_from_clips_to_metrics_offline(world, checkpoint, capsys, tmp_path):
    """Captions by one model and answers by another, in two shards: A is right for four of six questions."""
    clips = [json.loads(line) for line in (world / "clips.jsonl").read_text().splitlines()]
    questions = [
        {
            "video_id": Path(clip["video"]).stem,
            "video_duration": "30s",
            "questions": [{"Question": "Which?", "Choice": ["A. x", "B. y"], "Answer": "AAB"[n % 3], "Type": "Any"}],
        }
        for n, clip in enumerate(clips)
    ]
    data, out = tmp_path / "questions.json", tmp_path / "out"
    data.write_text(json.dumps(questions))
    command = ["evaluate", "daily-omni", "--data", str(data), "--videos", str(world / "clips"), "--out", str(out)]
    command += ["--checkpoint", str(checkpoint), *OPTIONS]
    capsys.readouterr()
    for shard in ("0/2", "1/2"):
        assert main([*command, "--shard", shard]) == 0
    assert capsys.readouterr().out == ""
    assert sorted(path.name for path in out.iterdir()) == ["captions.0-of-2.jsonl", "captions.1-of-2.jsonl"]
    assert [len(path.read_text().splitlines()) for path in sorted(out.iterdir())] == [3, 3]
    judge = ["--judge-model", str(write_constant_checkpoint(checkpoint, tmp_path / "judge"))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_captioned", None)  # the shards made all captions
        assert main([*command, *judge]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n"], result["asked"], result["missing"], result["failed"]) == (CLIPS, CLIPS, 0, [])
    assert result["metrics"]["accuracy"] == pytest.approx(100 * 4 / 6)
    assert result["metrics"]["length"] > 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalJudge, "_answers", None)  # answers are kept
        assert main([*command, *judge]) == 0
    assert json.loads(capsys.readouterr().out) == result
    # A random model gives no parsable answer: all are missing, and the run fails.
    assert main([*command, "--limit", "1", "--judge-model", str(checkpoint)]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["missing"] == 1
    assert "no answer of the judge is valid" in captured.err

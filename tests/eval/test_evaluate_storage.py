"""`evaluate` and storage: buckets, locks, and storage failures."""

import json
import os
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from chat import chat_server
from evaluate_runs import CLIPS, OPTIONS, evaluate
from gcs import proxied_bucket

from avocado_jax.__main__ import main
from avocado_jax.data import appended, storage
from avocado_jax.data.appended import open_lines
from avocado_jax.eval import runner
from avocado_jax.sampling.engine import Engine


def test_two_runs_on_one_file_are_refused(world, checkpoint, capsys, tmp_path):
    out = tmp_path / "captions.jsonl"
    with ExitStack() as stack:
        open_lines(str(out), stack)
        command = ["evaluate", "world", "--data", str(world / "clips.jsonl"), "--checkpoint", str(checkpoint)]
        assert main([*command, "--out", str(out)]) == 2
    assert "another run" in capsys.readouterr().err
    assert os.path.getsize(out) == 0


class Stub(Engine):
    """A fake engine: a caption is the number of its prompt's tokens. It is killed before clip `stop`."""

    stop, prompts = 99, {}

    def run(self, requests):
        for number, (item, row, _) in enumerate(requests):
            if number == Stub.stop:
                raise KeyboardInterrupt
            if isinstance(row, Exception):
                yield item, row
                continue
            Stub.prompts[item.id] = self.captioner.tokenizer.decode(row.prompt_ids.tolist())
            yield item, np.array([*str(len(row.prompt_ids)).encode(), self.captioner.stops[0]], np.int32)


def test_evaluation_in_a_bucket_from_data_to_results(world, world_clips, checkpoint, capsys, monkeypatch, tmp_path):
    """All files are in a bucket: a stopped run continues, a finished one makes no calls, results equal local ones."""
    monkeypatch.setattr(runner, "Engine", Stub)
    monkeypatch.setattr(appended, "INTERVAL", 0.0)
    monkeypatch.setattr(Stub, "prompts", {})
    local, _ = evaluate(capsys, world, "--checkpoint", checkpoint, "--out", tmp_path / "local.jsonl")
    clips = [json.loads(line) for line in (world / "clips.jsonl").read_text().splitlines()]
    official = [
        {
            "video_id": (name := Path(clip["video"]).stem),
            "video_duration": "30s",
            "questions": [{"Question": f"{name}?", "Choice": ["A. x", "B. y"], "Answer": "A", "Type": "Any"}],
        }
        for clip in clips
    ]
    with proxied_bucket(tmp_path / "buckets", monkeypatch) as proxy, chat_server(lambda *_: '{"answer": "A"}') as judge:
        for path in [*(world_clips / "clips").iterdir(), world_clips / "clips.jsonl"]:
            storage.write(f"gs://bucket/{path.relative_to(world_clips)}", path.read_bytes())
        storage.write("gs://bucket/questions.json", json.dumps(official).encode())
        storage.write("gs://bucket/prompts.txt", b"Why?\nWho?\n")
        proxy.faulty, proxy.every = (lambda method, path: method == "GET"), 4
        command = ["evaluate", "world", "--data", "gs://bucket/clips.jsonl", "--checkpoint", str(checkpoint), *OPTIONS]
        command += ["--out", "gs://bucket/world.jsonl"]
        monkeypatch.setattr(Stub, "stop", 2)
        assert main(command) == 130
        assert storage.read("gs://bucket/world.jsonl").count(b"\n") == 2
        monkeypatch.setattr(Stub, "stop", 99)
        capsys.readouterr()
        assert main(command) == 0
        shown = capsys.readouterr()
        assert "2 of 6 are in gs://bucket/world.jsonl already" in shown.err
        assert json.loads(shown.out) == json.loads(storage.read("gs://bucket/world.jsonl.result.json")) == local
        lines = [line for file in ("gs://bucket/world.jsonl", str(tmp_path / "local.jsonl"))
                 for line in sorted(storage.read(file).splitlines())]  # fmt: skip
        assert lines[:CLIPS] == lines[CLIPS:]

        command = ["evaluate", "daily-omni", "--data", "gs://bucket/questions.json", "--videos", "gs://bucket/clips"]
        command += ["--out", "gs://bucket/out", "--checkpoint", str(checkpoint), *OPTIONS]
        command += ["--prompt-file", "gs://bucket/prompts.txt", "--judge", judge.url, "--judge-model", "m"]
        Stub.prompts.clear()
        for shard in ("0/2", "1/2"):
            assert main([*command, "--shard", shard]) == 0
        assert all(("Why?" in text) + ("Who?" in text) == 1 for text in Stub.prompts.values())
        assert len({"Why?" in text for text in Stub.prompts.values()}) == 2
        for name in ("captions.0-of-2.jsonl", "captions.1-of-2.jsonl"):
            assert storage.read(f"gs://bucket/out/{name}").count(b"\n") == 3
        capsys.readouterr()
        assert main(command) == 0
        result = json.loads(capsys.readouterr().out)
        assert (result["n"], result["missing"], result["metrics"]["accuracy"]) == (CLIPS, 0, 100)
        assert len(judge.requests) == CLIPS
        assert main(command) == 0  # no clip is captioned again, and no question is repeated
        assert (len(judge.requests), len(Stub.prompts)) == (CLIPS, CLIPS)
        assert json.loads(capsys.readouterr().out) == result == json.loads(storage.read("gs://bucket/out/result.json"))
        assert {"table.md", "items.jsonl", "page.html", "answers.jsonl"} < {*storage.names("gs://bucket/out")}
        assert main(["report", "gs://bucket/out", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["results"] == {"daily-omni": result["metrics"]}
        assert main([*command, "--data", "gs://bucket/none.json"]) == 2
        assert "gs://bucket/none.json: no such object" in capsys.readouterr().err


def test_storage_failures_do_not_mark_clips_as_failed(world, checkpoint, capsys, monkeypatch):
    """The exit status is 1, so that a launcher restarts the job."""
    monkeypatch.setattr(runner, "Engine", Stub)
    monkeypatch.setattr(Stub, "prompts", {})

    def fails(*_):
        raise storage.StorageError("gs://bucket/x.mp4: 503")

    monkeypatch.setattr(runner.ClipSource, "read", fails)
    _, errors = evaluate(capsys, world, "--checkpoint", checkpoint, "--max-failed", 1, status=1)
    assert "gs://bucket/x.mp4: 503" in errors

"""The `world` command: output, resumption after stops, checks, and errors."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from avocado_jax.__main__ import main
from avocado_jax.world.timing import time_iou

MADE = ["--clips", "3", "--seed", "5", "--level", "0", "--references", "2", "--workers", "1"]


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    out = tmp_path_factory.mktemp("world") / "out"
    assert main(["world", str(out), *MADE]) == 0
    return out


def test_world_writes_a_manifest_and_clips(world):
    lines = [json.loads(line) for line in (world / "clips.jsonl").read_text().splitlines()]
    assert sorted(contents(world)) == sorted(["clips.jsonl", *(line["video"] for line in lines)])
    assert len(lines) == len({line["id"] for line in lines}) == 3
    fields = {"id", "video", "caption", "prompt", "references", "events", "dialogues", "keypoints", "probes"}
    assert all(line.keys() == fields and len(line["references"]) == 2 for line in lines)


def test_repeated_command_writes_only_missing_files(world, tmp_path):
    again = tmp_path / "again"
    assert main(["world", str(again), *MADE[:-1], "2"]) == 0
    assert contents(again) == contents(world)
    kept, gone, *_ = sorted((again / "clips").iterdir())
    before = kept.stat().st_mtime_ns
    gone.unlink()
    assert main(["world", str(again), *MADE]) == 0
    assert contents(again) == contents(world)
    assert kept.stat().st_mtime_ns == before


def test_world_with_times_in_captions(world, tmp_path, capsys):
    """The clips are the same; captions have the times of all events, and --check parses them."""
    out = tmp_path / "timed"
    assert main(["world", str(out), *MADE, "--timestamps"]) == 0
    plain, timed = (
        [json.loads(line) for line in (folder / "clips.jsonl").read_text().splitlines()] for folder in (world, out)
    )
    for one, other in zip(plain, timed, strict=True):
        same = one.keys() - {"caption", "references", "prompt"}
        assert {name: one[name] for name in same} == {name: other[name] for name in same}
        assert other["references"] == [other["caption"]]
        assert other["caption"].count("[") == len(other["events"])
        assert "[start - end]" in other["prompt"]
        assert time_iou(other["caption"], other) == pytest.approx(1)
    assert {path.name for path in (out / "clips").iterdir()} == {path.name for path in (world / "clips").iterdir()}
    capsys.readouterr()
    assert main(["world", "--check", str(out / "clips.jsonl"), "--truth", str(world / "clips.jsonl")]) == 0
    scores = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(score["recall"] == score["order"] == 1 and score["hallucination"] == 0 for score in scores)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_stopped_command_resumes_to_the_same_result(world, tmp_path, how):
    out = tmp_path / "out"
    command = [sys.executable, "-m", "avocado_jax", "world", str(out), *MADE]
    run = subprocess.Popen(command, start_new_session=True, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(out.glob("clips/*.mp4*")) and time.monotonic() < deadline:
        time.sleep(0.005)
    if how is signal.SIGKILL:
        os.killpg(run.pid, how)  # the workers too
        assert run.wait() == -how
    else:
        run.send_signal(how)
        assert run.wait() == 75
    assert not (out / "clips.jsonl").exists()
    assert all((world / "clips" / p.name).read_bytes() == p.read_bytes() for p in out.glob("clips/*.mp4"))
    assert main(["world", str(out), *MADE]) == 0
    assert contents(out) == contents(world)


@pytest.mark.slow
def test_two_hundred_clips_are_reproducible(tmp_path):
    made = []
    for name in ("one", "two"):
        assert main(["world", str(tmp_path / name), "--clips", "200", "--seed", "0"]) == 0
        made.append(contents(tmp_path / name))
    assert made[0] == made[1]
    assert len(made[0]) == 201


def test_check_prints_one_line_per_caption(world, tmp_path, capsys):
    made = [json.loads(line) for line in (world / "clips.jsonl").read_text().splitlines()]
    captions = [{"id": m["id"], "caption": m["references"][1]} for m in made]
    captions.append({"id": made[0]["id"], "caption": "A man walks his dog."})
    captions.append({"clip": f"some/where/{made[1]['id']}.mp4", "caption": made[1]["caption"], "truncated": False})
    captions.append({"clip": "some/where/bad.mp4", "error": "bad.mp4: no video"})
    captions.append({"clip": made[2]["id"], "caption": made[2]["caption"]})  # of `caption --manifest`
    file = tmp_path / "captions.jsonl"
    file.write_text("\n".join(map(json.dumps, captions)))
    assert main(["world", "--check", str(file), "--truth", str(world / "clips.jsonl")]) == 0
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    perfect = {"recall": 1.0, "hallucination": 0.0, "order": 1.0, "dialogue_f1": 1.0}
    assert printed[:3] == [{"id": m["id"], **perfect} for m in made]
    assert printed[3]["recall"] == 0
    assert printed[3]["hallucination"] == 1
    assert printed[4:] == [{"id": m["id"], **perfect} for m in made[1:3]]


def test_invalid_input_is_a_one_line_error(world, tmp_path, capsys):
    (tmp_path / "file").touch()
    truth = str(world / "clips.jsonl")
    good = json.loads((world / "clips.jsonl").read_text().splitlines()[0])

    def run_with_bad_input(text, *, truth=truth, name="captions.jsonl"):
        (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["--check", str(tmp_path / name), "--truth", truth]

    def wrong_truth(record):
        path = tmp_path / f"truth{len(list(tmp_path.iterdir()))}.jsonl"
        path.write_text(json.dumps(record))
        return run_with_bad_input(json.dumps({"id": good["id"], "caption": ""}), truth=str(path), name="good.jsonl")

    out = str(tmp_path / "out")
    tour = [
        ([], "world OUT --clips N"),
        ([out], "world OUT --clips N"),
        ([out, "--clips", "0"], "--clips must be at least 1"),
        ([out, "--clips", "2", "--references", "-1"], "--references must be"),
        ([out, "--clips", "2", "--workers", "-1"], "--workers must be"),
        ([str(tmp_path / "file"), "--clips", "2"], "cannot make"),
        (["--check", "x.jsonl"], "go together"),
        ([out, "--clips", "2", "--truth", truth], "go together"),
        (["--check", str(tmp_path / "absent.jsonl"), "--truth", truth], "absent.jsonl: No such file"),
        (["--check", str(tmp_path), "--truth", truth], "Is a directory"),
        (run_with_bad_input("", name="empty.jsonl"), "has no lines"),
        (run_with_bad_input('{"id": "a"\n', name="a.jsonl"), "a.jsonl:1: not JSON"),
        (run_with_bad_input(b"\n\xff\xfe{}", name="b.jsonl"), "b.jsonl:2: not JSON"),
        (run_with_bad_input("[1, 2]", name="c.jsonl"), "not a JSON object"),
        (run_with_bad_input('{"caption": "x"}', name="d.jsonl"), 'd.jsonl:1: "id" must be a string'),
        (run_with_bad_input('{"id": "x", "caption": null}', name="e.jsonl"), '"caption" must be a string'),
        (run_with_bad_input('{"id": "x", "caption": "x"}', name="f.jsonl"), 'has no clip "x"'),
        (wrong_truth({**good, "events": "none"}), '"events" must be a list'),
        (
            wrong_truth({**good, "events": [{"text": "A bell rings."}]}),
            '"events" needs "text" (a string) and "start" (a number)',
        ),
        (wrong_truth({**good, "events": [{"text": 3, "start": 0}]}), '"events" needs'),
        (wrong_truth({**good, "events": [{"text": "A bell rings.", "start": "0"}]}), '"events" needs'),
        (wrong_truth({**good, "dialogues": [3]}), '"dialogues" needs'),
        (wrong_truth({**good, "events": [{"text": "It rains.", "start": 0}]}), "not in the language"),
    ]
    for arguments, message in tour:
        status = main(["world", *arguments])
        captured = capsys.readouterr()
        assert status == 2, arguments
        assert message in captured.err
        assert captured.err.count("\n") == 1
        assert "Traceback" not in captured.err
    with pytest.raises(SystemExit, match="2"):
        main(["world", out, "--clips", "some"])
    assert not (tmp_path / "out").exists()

"""prepare: bad input, kills, checksums, features; the command's exit statuses."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from stream_fixtures import READING, recipe, write_clip, write_manifest
from tokenizer import write_tokenizer as real_tokenizer

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.load import SHIPPED
from avocado_jax.data.decode import read_media
from avocado_jax.data.index import load_index, measured
from avocado_jax.data.make_shard import Job
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.pipeline import row_sizes
from avocado_jax.data.prepare import prepare
from avocado_jax.data.prompt import chat_prompt, choose_prompt, load_tokenizer
from avocado_jax.data.records import Record, decoded, pack, unpack
from avocado_jax.data.rows import make_row, shape_of
from avocado_jax.data.sources import open_shards
from avocado_jax.data.tokenizer import SPECIAL, write_tokenizer
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY


def job(folder: Path, out: str = "out", **changes) -> Job:
    return Job(str(folder / "clips.jsonl"), str(folder / out), **(dict(shard_records=3, reading=READING) | changes))


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """A folder with a manifest of eight clips, prepared in `whole`."""
    folder = tmp_path_factory.mktemp("clips")
    write_manifest(folder, 8)
    assert prepare(job(folder, "whole"), workers=2).complete
    return folder


def test_records_round_trip(clips):
    source = open_shards(str(clips / "whole"), READING)
    lines = [json.loads(line) for line in (clips / "clips.jsonl").read_text().splitlines()]
    assert source.index.ids == [line["id"] for line in lines]
    assert source.index.shard.tolist() == [0, 0, 0, 1, 1, 1, 2, 2]
    for number, line in enumerate(lines):
        record = source[number]
        assert record.clip == (clips / line["video"]).read_bytes()
        assert record.fields == {key: value for key, value in line.items() if key != "video"}
    assert (clips / "whole" / "rejects.jsonl").read_text() == ""
    assert not (clips / "whole" / "parts").exists()


def test_index_has_the_shape_of_every_row(clips):
    settings, source = recipe(), open_shards(str(clips / "whole"), READING)
    known = row_sizes(source.index, settings)
    longest = max(
        (chat_prompt(settings.words, text) for text in settings.prompts), key=lambda prompt: len(prompt.after)
    )
    for number in range(len(source)):
        row = make_row(decoded(source[number], READING), longest, TINY, READING)
        assert shape_of(row.clip) == tuple(column[number] for column in known.shape)


def test_features_give_the_same_rows(clips):
    prepare(job(clips, "features", features=True), workers=1)
    raw, ready = open_shards(str(clips / "whole"), READING), open_shards(str(clips / "features"), READING)
    for number in range(len(raw)):
        one, two = decoded(raw[number], READING), ready[number].clip
        np.testing.assert_array_equal(one.frames, two.frames)
        assert (one.samples is None) == (two.samples is None)
        if one.samples is not None:
            np.testing.assert_array_equal(one.samples, two.samples)
        assert one.seconds == two.seconds


def test_killed_run_resumes_to_the_same_bytes(clips):
    """The first clip of the last shard is a pipe without a writer, so the run hangs there and is killed."""
    lines = [json.loads(line) for line in (clips / "clips.jsonl").read_text().splitlines()]
    stuck = clips / lines[6]["video"]
    data = stuck.read_bytes()
    stuck.unlink()
    os.mkfifo(stuck)
    code = (
        "from test_prepare import job, prepare, Path\n"
        f"if __name__ == '__main__': prepare(job(Path({str(clips)!r}), 'killed'), 1)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    script = clips / "run.py"
    script.write_text(code)
    process = subprocess.Popen([sys.executable, str(script)], env=environment, start_new_session=True)
    parts = clips / "killed" / "parts"
    while len(list(parts.glob("shard-*.json"))) < 2:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).stdout:
        assert time.monotonic() < deadline, "workers live on"
        time.sleep(0.05)
    stuck.unlink()
    stuck.write_bytes(data)

    made = {path: path.stat().st_mtime_ns for path in (clips / "killed").glob("shard-*")}
    assert len(made) == 2
    with pytest.raises(InputError, match=r"manifest\.json: No such file"):
        open_shards(str(clips / "killed"), READING)
    assert prepare(job(clips, "killed"), workers=2).complete
    assert made == {path: path.stat().st_mtime_ns for path in made}
    assert contents(clips / "killed") == contents(clips / "whole")


def test_damaged_shard_is_rebuilt_on_resume(clips):
    (clips / "clips" / "bad.mp4").write_bytes(b"")
    assert not prepare(job_with_bad(clips, "damaged"), workers=1, max_reject_share=0.0).complete
    shard = sorted((clips / "damaged").glob("shard-*"))[0]
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert prepare(job_with_bad(clips, "damaged"), workers=1, max_reject_share=1.0).complete
    assert not shard.exists()
    source = open_shards(str(clips / "damaged"), READING)
    assert source.index.ids == [f"clip-{number}" for number in (3, 4, 5, 6, 7, 0, 1, 2)]
    assert [source[number].fields["id"] for number in range(8)] == source.index.ids
    remade = clips / "damaged" / "shard-00001-00000.array_record"
    assert remade.read_bytes() == (clips / "whole" / "shard-00000-00000.array_record").read_bytes()
    (clips / "damaged" / "shard-00000-00001.array_record").unlink()  # of a complete folder
    assert prepare(job_with_bad(clips, "damaged"), workers=1, max_reject_share=1.0).records == 8
    open_shards(str(clips / "damaged"), READING).check()
    lines = (clips / "clips.jsonl").read_text().splitlines(keepends=True)
    (clips / "other.jsonl").write_text("".join(lines[1:]))
    with pytest.raises(InputError, match="empty it first"):
        prepare(Job(str(clips / "other.jsonl"), str(clips / "damaged"), shard_records=3, reading=READING), workers=1)


def job_with_bad(folder: Path, out: str) -> Job:
    path = folder / "with_bad.jsonl"
    bad = {"id": "bad", "video": "clips/bad.mp4", "caption": "nothing"}
    path.write_text((folder / "clips.jsonl").read_text() + json.dumps(bad) + "\n")
    return Job(str(path), str(folder / out), shard_records=3, reading=READING)


def test_bad_and_unusual_clips(tmp_path):
    good = write_clip(tmp_path / "good.mp4")
    data = good.read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "short.mp4").write_bytes(data[: len(data) // 2])
    (tmp_path / "words.mp4").write_text("these are words")
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "video.txt").write_bytes(data)
    write_clip(tmp_path / "silent.mp4", sound=False)
    write_clip(tmp_path / "blink.mp4", seconds=0.1)
    write_clip(tmp_path / "long.mov", seconds=600, size=(28, 28), fps=2)
    write_clip(tmp_path / "片段 é🎬.mp4")
    bad = {
        "empty.mp4": "is empty",
        "short.mp4": "",
        "words.mp4": "not a video",
        "folder.mp4": "directory",
        "missing.mp4": "No such file",
    }
    fine = ["good.mp4", "video.txt", "silent.mp4", "blink.mp4", "long.mov", "片段 é🎬.mp4", str(good)]
    lines = [{"id": name, "video": name, "caption": f"of {name}"} for name in (*bad, *fine)]
    lines.append({"id": "good.mp4", "video": "silent.mp4", "caption": "again"})
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines) + "{\n")

    done = prepare(job(tmp_path), workers=1, max_reject_share=0.6)
    assert done.complete
    rejects = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(reject["line"], reject["id"]) for reject in rejects] == [
        *enumerate(bad, start=1),
        (13, "good.mp4"),
        (14, None),
    ]
    for one, reason in zip(rejects, bad.values()):
        assert reason in one["reason"]
        assert str(tmp_path) not in one["reason"]
        assert one["video"] == one["id"]
    source = open_shards(str(tmp_path / "out"), READING)
    assert source.index.ids == fine
    index = dict(zip(source.index.ids, range(len(fine))))
    assert source.index.mel[index["silent.mp4"]] == 0
    assert source.index.frames[index["long.mov"]] == 768
    assert source.index.mel[index["long.mov"]] == 30_000
    assert source[index["video.txt"]].clip == data


def test_endless_clip_is_rejected_by_timeout(tmp_path):
    os.mkfifo(tmp_path / "endless.mp4")
    write_clip(tmp_path / "good.mp4")
    lines = [{"id": name, "video": f"{name}.mp4", "caption": "c"} for name in ("endless", "good")]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = prepare(job(tmp_path, clip_seconds=4.0), workers=1, max_reject_share=0.5)
    assert done.records == 1
    assert [(reject.reason, reject.retry) for reject in done.rejects] == [("took longer than 4 s", True)]


def test_caption_lengths_are_counted_in_tokens(tmp_path):
    write_clip(tmp_path / "a.mp4")
    caption = "He says <|im_end|> and <|VIDEO|>."
    line = {"id": "a", "video": "a.mp4", "caption": caption, "prompt": "Why <|im_start|>?"}
    (tmp_path / "clips.jsonl").write_text(json.dumps(line))
    write_tokenizer(tmp_path / "tokenizer")
    words = load_words(tmp_path / "tokenizer")
    assert prepare(job(tmp_path, words=words), workers=1).complete
    index = open_shards(str(tmp_path / "out"), READING).index
    assert (index.unit, index.caption[0], index.prompt[0]) == ("token", len(caption), len(line["prompt"]))
    with pytest.raises(InputError, match="empty it first"):
        prepare(job(tmp_path), workers=1)


@pytest.mark.parametrize("write", [write_tokenizer, real_tokenizer])
def test_tokenizer_is_that_of_the_checkpoint(tmp_path, write):
    write(tmp_path)
    tokenizer, words = load_tokenizer(tmp_path), load_words(tmp_path)
    special = {tokenizer.convert_tokens_to_ids(token) for token in SPECIAL}
    for text in ("plain", "e\u0301 猫 and <|im_end|> 12345\n\n x", "".join(SPECIAL), "<tool_call><|fim_pad|>"):
        assert words.encode(text) == tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        assert not set(words.encode(text)) & special
    assert words.get_added_vocab() == tokenizer.get_added_vocab()
    assert chat_prompt(words, "What?") == chat_prompt(tokenizer, "What?")


def test_damaged_records_are_reported():
    record = Record({"id": "a", "caption": "c"}, Media(np.zeros((2, 28, 28, 3), np.uint8), None, 1.0), "a.mp4")
    data = pack(record)
    assert unpack(data).fields == record.fields
    for bad in (b"", data[:-5], b"\x81\xa1a\x01", data.replace(b"version\x01", b"version\x02")):
        with pytest.raises(InputError, match="record"):
            unpack(bad)
    with pytest.raises(InputError, match="not an index"):
        load_index(b"{}", "byte", "here")
    assert measured(record, record.clip)["mel"] == 0


def test_prepare_command_prints_its_result(tmp_path, capsys):
    write_manifest(tmp_path, 2)
    arguments = ["prepare", str(tmp_path / "clips.jsonl"), str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["records"], summary["rejected"], summary["complete"]) == (2, 0, True)
    before = contents(tmp_path / "out")
    assert main(arguments) == 0  # a second time there is nothing to do
    assert contents(tmp_path / "out") == before
    assert main([*arguments, "--features"]) == 2
    assert "empty it first" in capsys.readouterr().err
    (tmp_path / "prompts.txt").write_text("Why?\nWho?\n")
    assert main([*arguments, "--prompt-file", str(tmp_path / "prompts.txt")]) == 2  # other rows than before
    assert "empty it first" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path / "none.jsonl"), str(tmp_path / "new")]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    small = ["--reading", "fewest_pixels=784", "--reading", "most_pixels=3136", "--reading", "clip_pixels=313600"]
    assert main([*arguments[:2], str(tmp_path / "small"), *small]) == 0
    assert len(open_shards(str(tmp_path / "small"), READING)) == 2
    assert main([*arguments[:2], str(tmp_path / "new"), "--reading", "most_pixel=1"]) == 2
    assert "did you mean most_pixels?" in capsys.readouterr().err
    for value in ("0", "x", "nan"):
        assert main([*arguments[:2], str(tmp_path / "new"), "--reading", f"fps={value}"]) == 2
        assert "not a positive float" in capsys.readouterr().err
    with (tmp_path / "clips.jsonl").open("a") as file:
        file.write("{\n")
    assert main(["prepare", str(tmp_path / "clips.jsonl"), str(tmp_path / "more"), "--workers", "1"]) == 3
    assert "rejected line 3" in capsys.readouterr().err
    assert not (tmp_path / "more" / "manifest.json").exists()


def test_rows_without_a_prompt_get_one_from_the_prompt_file(tmp_path):
    """The id of the row selects the prompt; an existing prompt stays."""
    write_manifest(tmp_path, 4)
    lines = [json.loads(line) for line in (tmp_path / "clips.jsonl").read_text().splitlines()]
    given = {lines[0]["id"]: "What?"}
    lines[0]["prompt"] = "What?"
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    prompts = tuple(f"Prompt {number}?" for number in range(9))
    assert prepare(job(tmp_path, prompts=prompts), workers=1).complete
    shards = open_shards(str(tmp_path / "out"), READING)
    found = {shards[number].fields["id"]: shards[number].fields["prompt"] for number in range(4)}
    assert found == {line["id"]: given.get(line["id"], choose_prompt(prompts, line["id"])) for line in lines}
    assert len({*found.values()}) > 2


def test_stopped_command_reports_that_it_can_resume(tmp_path):
    write_manifest(tmp_path, 2)
    (tmp_path / "clips" / "000.mp4").unlink()
    os.mkfifo(tmp_path / "clips" / "000.mp4")
    command = [sys.executable, "-m", "avocado_jax", "prepare", str(tmp_path / "clips.jsonl"), str(tmp_path / "out")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "parts" / "job.json").exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.terminate()
    assert "the same command resumes" in process.communicate()[1]
    assert process.returncode == 75


def test_full_disk_is_a_one_line_error_and_the_run_resumes(tmp_path):
    """A limit on file sizes simulates a full disk."""
    write_manifest(tmp_path, 2)
    arguments = ["prepare", str(tmp_path / "clips.jsonl"), str(tmp_path / "out"), "--workers", "1"]
    code = "import resource, sys; from avocado_jax.__main__ import main\nif __name__ == '__main__':\n"
    code += " resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192)); sys.exit(main(sys.argv[1:]))\n"
    script = tmp_path / "limited.py"
    script.write_text(code)
    done = subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "the same command resumes" in done.stderr
    assert done.stderr.count("\n") == 1
    assert main(arguments) == 0


def test_clips_read_equally_from_bytes_and_files(tmp_path):
    path = write_clip(tmp_path / "a.mp4")
    one = read_media(path, READING)
    two = decoded(Record({}, path.read_bytes(), "a.mp4"), READING)
    np.testing.assert_array_equal(one.frames, two.frames)
    np.testing.assert_array_equal(one.samples, two.samples)


def test_checkpoint_sets_sampling_and_tokenizer(tmp_path, monkeypatch):
    """`--checkpoint` sets the reading and the tokenizer; `--reading` and `--tokenizer` take precedence."""
    jobs = []
    monkeypatch.setattr("avocado_jax.cli.prepare.prepare", lambda job, *_: jobs.append(job))
    monkeypatch.chdir(tmp_path)  # the shipped captioner is found from any folder
    model, other = "avocado_jax/assets/captioner", real_tokenizer(tmp_path / "other")
    (other / "reading.json").write_text(json.dumps({"align_sound": True}))
    for more in ((), ("--checkpoint", model), ("--checkpoint", model, "--reading", "fps=1", "--tokenizer", str(other))):
        assert main(["prepare", "clips.jsonl", "out", "--shard", "0/2", *more]) == 0
    assert main(["prepare", "clips.jsonl", "out", "--shard", "0/2", "--checkpoint", str(other)]) == 0
    default, shipped, changed, aligned = (one.reading for one in jobs)
    assert default == Reading()
    assert shipped == Reading(fewest_pixels=784)
    assert changed == Reading(fewest_pixels=784, fps=1.0)
    assert aligned == Reading(align_sound=True)
    words = [one.words for one in jobs]
    assert words == [None, load_words(SHIPPED), load_words(other), load_words(other)]
    assert words[1] != words[2]
    assert main(["prepare", "clips.jsonl", "out", "--checkpoint", "nowhere"]) == 2

"""prepare from the layout of the published training set, WebDataset and Parquet; machines, kills, appended rows."""

import json
import shutil
from pathlib import Path

import gcs
import pytest
from hub import hub_server
from prepare_fixtures import contents, job, lines_of, pack_tar, swift
from stream_fixtures import READING

from avocado_jax.__main__ import main
from avocado_jax.data import media_sources, storage
from avocado_jax.data.decode import read_media
from avocado_jax.data.make_shard import Job
from avocado_jax.data.prepare import prepare
from avocado_jax.data.reader import ClipReader
from avocado_jax.data.sources import open_shards
from avocado_jax.errors import InputError


@pytest.fixture
def opened(monkeypatch) -> list[str]:
    """Records the names of source files that are opened."""
    names: list[str] = []
    real = media_sources.File.open
    monkeypatch.setattr(media_sources.File, "open", lambda self: names.append(self.name) or real(self))
    return names


def test_rows_and_clips_are_matched_counted_and_listed(published, clip_bytes):
    source = open_shards(str(published / "whole"), READING)
    ids = [name.partition("#")[0] for name in source.index.ids]
    assert ids == [f"videos/0{n}.mp4" for n in (0, 1, 2, 3)] + ["/data/authors/videos/03.mp4"] + [
        f"videos/0{n}.mp4" for n in (4, 5, 6, 7)
    ]
    assert source.index.shard.tolist() == [0, 0, 1, 2, 2, 3, 3, 4, 4]  # 4 and 5 of part 1; a shard has one part's clips
    for number, clip in enumerate((0, 1, 2, 3, 3, 4, 5, 6, 7)):
        record = source[number]
        assert record.clip == clip_bytes[clip % 4]
        assert record.fields["system"] == "Be exact."
    rejects = lines_of(published / "whole" / "rejects.jsonl")
    assert [(reject["line"], reject["reason"], reject["retry"]) for reject in rejects] == [
        (10, "its clip is in none of the parts", True)
    ]
    assert lines_of(published / "whole" / "unused.jsonl") == [
        {"part": "videos.part-002.tar.gz", "clip": "videos/08.mp4"}
    ]


def test_a_bucket_and_the_hub_give_the_same_bytes(published, tmp_path, monkeypatch, in_process):
    files = {path.name: path.read_bytes() for path in published.iterdir() if path.is_file()}
    whole = contents(published / "whole")
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add("ORG/set", files, "datasets")
        arguments = ["hub:ORG/set", str(tmp_path / "out"), "--shard-records", "2", "--max-reject-share", "0.2"]
        small = ("fewest_pixels=784", "most_pixels=3136", "clip_pixels=313600")
        assert main(["prepare", *arguments, *(part for one in small for part in ("--reading", one))]) == 0
        assert contents(tmp_path / "out") == whole
        assert sorted(name for name in hub.fetched() if name in files) == sorted(files)  # each once
    with gcs.proxied_bucket(tmp_path / "storage", monkeypatch):
        for name, data in files.items():
            storage.write(f"gs://bucket/set/{name}", data)
        remote = Job("gs://bucket/set/set.jsonl", "gs://bucket/out", False, None, 2, reading=READING)
        done = prepare(Job(**(vars(remote) | {"media": "gs://bucket/set/"})), 1, 0.2)
        assert (done.records, len(done.rejects), done.unused) == (9, 1, 1)
        assert {
            one.name: storage.read(f"gs://bucket/out/{one.name}") for one in storage.listing("gs://bucket/out")
        } == whole


def test_resume_after_any_stop_gives_the_same_bytes(published, tmp_path, monkeypatch, in_process):
    whole = contents(published / "whole")

    def stop_at(last: int) -> None:
        calls = iter(range(1000))
        for name in ("write", "upload", "delete"):
            real = getattr(storage, name)

            def call(*args, real=real):
                if next(calls) == last:
                    raise KeyboardInterrupt
                return real(*args)

            patch.setattr(storage, name, call)

    for last in (0, 1, 2, 4, 9, 12, 16, 17, 18, 26):  # from 18 on: parts/ is emptied
        out = tmp_path / str(last)
        with monkeypatch.context() as patch:
            stop_at(last)
            with pytest.raises(KeyboardInterrupt):
                prepare(job(published, out), 1, 0.2)
        out.mkdir(exist_ok=True)
        (out / "rejects.jsonl.7.part").touch()  # of a write that was killed
        assert prepare(job(published, out), 1, 0.2).complete
        assert contents(out) == whole, last


def test_shards_of_several_machines_and_finish_give_the_same_bytes(published, tmp_path, in_process, opened):
    out = tmp_path / "out"
    with pytest.raises(InputError, match="nothing is prepared"):
        prepare(job(published, out), 1, 0.2, finish=True)
    for machine in (1, 0):
        opened.clear()
        if machine == 0:
            with pytest.raises(InputError, match="is not prepared"):
                prepare(job(published, out), 1, 0.2, finish=True)
        assert prepare(job(published, out), 1, 0.2, shard=(machine, 2)) is None
        parts = [name for name in opened if name.endswith("gz")]
        assert parts == [f"videos.part-00{part}.tar.gz" for part in ((1,), (0, 2))[1 - machine]]
        opened.clear()
        prepare(job(published, out), 1, 0.2, shard=(machine, 2))
        assert not opened  # done: nothing is read again
    assert not (out / "manifest.json").exists()
    assert prepare(job(published, out), 1, 0.2, finish=True).complete
    assert contents(out) == contents(published / "whole")
    assert prepare(job(published, out), 1, 0.2, finish=True).records == 9


def test_appended_rows_and_parts_go_to_new_shards(published, tmp_path, clip_bytes, in_process, opened):
    folder, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("whole"))
    assert prepare(job(folder, out), 1, 0.2).complete
    made = {path: path.read_bytes() for path in out.glob("shard-*")}
    opened.clear()
    before = contents(out)
    assert prepare(job(folder, out), 1, 0.2).complete
    assert not opened
    assert contents(out) == before

    pack_tar(folder / "videos.part-003.tar.gz", {"videos/lost.mp4": clip_bytes[1]})
    done = prepare(job(folder, out), 1, 0.2)
    assert (done.records, done.rejects) == (10, [])
    assert opened == ["videos.part-003.tar.gz"]
    opened.clear()
    with (folder / "set.jsonl").open("a") as file:  # a clip without a row so far, and one that has a row
        file.write(
            "".join(json.dumps(swift(n, video)) + "\n" for n, video in ((10, "videos/08.mp4"), (11, "videos/00.mp4")))
        )
    assert prepare(job(folder, out), 1, 0.2).records == 12
    assert opened == ["videos.part-000.tar.gz", "videos.part-002.tar.gz"]
    assert {path: path.read_bytes() for path in made} == made
    source = open_shards(str(out), READING)
    assert [source[number].fields["id"] for number in range(12)] == source.index.ids
    assert [name.partition("#")[0] for name in source.index.ids[9:]] == [
        "videos/lost.mp4",
        "videos/00.mp4",
        "videos/08.mp4",
    ]
    assert lines_of(out / "unused.jsonl") == []
    (folder / "set.jsonl").write_text(json.dumps(swift(0, "videos/01.mp4")))
    with pytest.raises(InputError, match="another manifest"):
        prepare(job(folder, out), 1, 0.2)


def test_damaged_part_rejects_its_remaining_clips_and_is_retried(published, tmp_path, in_process, opened):
    folder, out = tmp_path / "set", tmp_path / "out"
    shutil.copytree(published, folder, ignore=shutil.ignore_patterns("whole"))
    part = folder / "videos.part-001.tar.gz"
    data = part.read_bytes()
    part.write_bytes(data[: len(data) // 2] + bytes(len(data) - len(data) // 2))
    done = prepare(job(folder, out), 1, 0.7)
    assert "damaged or cut short" in done.rejects[0].reason
    assert 5 <= done.records < 9
    part.write_bytes(data)
    opened.clear()
    assert prepare(job(folder, out), 1, 0.2).records == 9
    assert opened == ["videos.part-001.tar.gz"]


def test_prepare_from_webdataset(tmp_path, clip_bytes, in_process, opened):
    clips = {
        "a/1.mp4": clip_bytes[0],
        "a/1.txt": b"One.",
        "2.json": b'{"caption": "Two.", "id": "two"}',
        "2.mp4": clip_bytes[1],
    }
    pack_tar(tmp_path / "a-0.tar", clips | {"3.mp4": clip_bytes[2], "4.json": b'{"caption": "Four."}'})
    pack_tar(
        tmp_path / "a-1.tar",
        {"2.mp4": clip_bytes[3], "2.json": b'{"caption": "Again.", "id": "two"}', "5.mp4": b"x", "5.json": b"{"},
    )
    wanted = Job(str(tmp_path / "a-*.tar"), str(tmp_path / "out"), shard_records=4, reading=READING)
    done = prepare(wanted, 1, 0.7)
    assert done.complete
    source = open_shards(str(tmp_path / "out"), READING)
    assert source.index.ids == ["a-0/a/1", "two"]
    assert [source[number].clip for number in (0, 1)] == clip_bytes[:2]
    assert [source[number].fields["caption"] for number in (0, 1)] == ["One.", "Two."]
    assert [(reject.part, reject.line, reject.reason.partition(" (")[0]) for reject in done.rejects] == [
        ("a-0.tar", 4, "has no clip beside it"),
        ("a-1.tar", 1, "its id is that of an earlier clip"),
        ("a-1.tar", 2, "not JSON"),
    ]
    assert lines_of(tmp_path / "out" / "unused.jsonl") == [{"part": "a-0.tar", "clip": "3.mp4"}]
    pack_tar(tmp_path / "a-2.tar", {"9.mp4": clip_bytes[2], "9.txt": b"Nine."})
    opened.clear()
    assert prepare(wanted, 1, 0.7).records == 3
    assert opened == ["a-2.tar"]


def test_prepare_from_parquet_with_clips_or_paths(tmp_path, clip_bytes, in_process):
    import pyarrow
    import pyarrow.parquet

    rows = [
        {"id": str(n), "caption": f"Clip {n}.", "video": {"bytes": clip_bytes[n], "path": f"{n}.mov"}} for n in range(3)
    ]
    rows[1]["video"]["bytes"] = None
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "inside.parquet")
    done = prepare(Job(str(tmp_path / "inside.parquet"), str(tmp_path / "one"), reading=READING), 1, 0.5)
    assert [(reject.line, reject.reason) for reject in done.rejects] == [(2, "has no clip beside it")]
    source = open_shards(str(tmp_path / "one"), READING)
    assert [(source[n].fields, source[n].clip) for n in (0, 1)] == [
        ({"id": "0", "caption": "Clip 0."}, clip_bytes[0]), ({"id": "2", "caption": "Clip 2."}, clip_bytes[2])
    ]  # fmt: skip
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "0.mov").write_bytes(clip_bytes[0])
    table = pyarrow.Table.from_pylist([swift(0, "0.mov") | {"id": "a"}, swift(1, "1.mov") | {"id": None}])
    pyarrow.parquet.write_table(table, tmp_path / "paths.parquet")
    wanted = Job(str(tmp_path / "paths.parquet"), str(tmp_path / "two"), media=str(tmp_path / "clips"), reading=READING)
    done = prepare(wanted, 1, 0.5)
    assert [(reject.line, reject.video, reject.retry) for reject in done.rejects] == [(2, "1.mov", True)]
    assert open_shards(str(tmp_path / "two"), READING)[0].fields["prompt"] == "Describe it."


def test_bad_lines_and_bad_clips_do_not_end_the_job(tmp_path, clip_bytes, monkeypatch, in_process):
    for name in ("good", "memory", "overflow"):
        (tmp_path / f"{name}.mov").write_bytes(clip_bytes[0])
    (tmp_path / "words.mp4").write_text("these are words")
    videos = {"good": "good.mov", "nul": "a\0b.mp4", "half": "\udce9.mp4", "long": "x" * 300 + ".mp4"}
    videos |= {name: f"{name}.mov" for name in ("memory", "overflow", "missing")} | {"words": "words.mp4"}
    lines = [json.dumps({"id": name, "video": video, "caption": "c"}) for name, video in videos.items()]
    for name, value in (("big", str(10**30)), ("digits", "9" * 5000), ("deep", "[" * 600 + "]" * 600)):
        lines.append(f'{{"id": "{name}", "video": "good.mov", "caption": "c", "extra": {value}}}')
    (tmp_path / "clips.jsonl").write_text("\n".join(lines))

    def read(self, path, reading):
        if Path(path).read_bytes() == clip_bytes[0]:
            failure = next(failures)
            if failure:
                raise failure
        return read_media(path, reading)

    failures = iter([None, MemoryError("out of memory"), OverflowError("too large")])
    monkeypatch.setattr(ClipReader, "read", read)
    done = prepare(Job(str(tmp_path / "clips.jsonl"), str(tmp_path / "out"), reading=READING), 1, 0.95)
    assert (done.records, done.complete) == (1, True)
    assert {reject.id: reject.retry for reject in done.rejects} == dict.fromkeys(
        ["nul", "half", "long", "memory", "overflow", "missing", "words", "big", None, "deep"], False
    ) | {"memory": True, "missing": True}
    reasons = {reject.id: reject.reason for reject in done.rejects}
    assert "NUL" in reasons["nul"]
    assert "surrogate" in reasons["half"]
    assert reasons["long"] == "File name too long"
    assert reasons["memory"] == "MemoryError: out of memory"
    assert reasons["overflow"] == "OverflowError: too large"
    assert "cannot be stored" in reasons["big"]
    assert [json.loads(line)["line"] for line in (tmp_path / "out" / "rejects.jsonl").open()] == list(range(2, 12))


def test_transient_rejects_are_retried_and_appended(tmp_path, clip_bytes, monkeypatch, in_process):
    media, read = tmp_path / "media", []
    media.mkdir()
    for number in range(4):
        (media / f"{number}.mov").write_bytes(clip_bytes[number])
    (media / "bad.mp4").write_bytes(b"bad")
    (media / "late.mov").write_bytes(clip_bytes[0])
    (media / "notes.txt").write_bytes(b"not a clip")
    names = ["0.mov", "gone.mov", "bad.mp4", "./1.mov", "2.mov", "late.mov"]
    manifest = tmp_path / "clips.jsonl"
    manifest.write_text("\n".join(json.dumps({"id": name, "video": name, "caption": "c"}) for name in names))
    real = storage.read

    def reading(path):
        read.append(Path(path).name)
        if path.endswith("late.mov") and not (media / "gone.mov").exists():
            raise TimeoutError("took longer than 4 s")
        return real(path)

    monkeypatch.setattr(storage, "read", reading)
    wanted = Job(str(manifest), str(tmp_path / "out"), shard_records=2, reading=READING, media=str(media))
    assert not prepare(wanted, 1, 0.2).complete
    done = prepare(wanted, 1, 0.5)  # no change
    assert [(reject.id, reject.retry) for reject in done.rejects] == [
        ("gone.mov", True),
        ("bad.mp4", False),
        ("late.mov", True),
    ]
    assert lines_of(tmp_path / "out" / "unused.jsonl") == [{"part": "", "clip": "3.mov"}]
    made = {path: path.read_bytes() for path in (tmp_path / "out").glob("shard-*")}
    before = contents(tmp_path / "out")
    assert prepare(wanted, 1, 0.5).complete
    assert contents(tmp_path / "out") == before  # the causes have not passed

    (media / "gone.mov").write_bytes(clip_bytes[1])
    with manifest.open("a") as file:
        file.write("\n" + json.dumps({"id": "3", "video": "3.mov", "caption": "c"}))
    read.clear()
    done = prepare(wanted, 1, 0.5)
    assert (done.records, [reject.id for reject in done.rejects], done.unused) == (6, ["bad.mp4"], 0)
    assert [name for name in read if name.endswith((".mov", ".mp4"))] == ["gone.mov", "late.mov", "3.mov"]
    assert {path: path.read_bytes() for path in made} == made
    source = open_shards(str(tmp_path / "out"), READING)
    assert source.index.ids == ["0.mov", "./1.mov", "2.mov", "gone.mov", "late.mov", "3"]
    assert [source[number].fields["id"] for number in range(6)] == source.index.ids

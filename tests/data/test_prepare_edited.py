"""prepare after the manifest was edited: records whose lines are unchanged stay, the others are prepared again."""

import json
from pathlib import Path

import pytest
from prepare_fixtures import lines_of
from stream_fixtures import READING

from avocado_jax.data import storage
from avocado_jax.data.make_shard import Job
from avocado_jax.data.prepare import prepare
from avocado_jax.data.sources import open_shards
from avocado_jax.errors import InputError


@pytest.fixture
def read(monkeypatch) -> list[str]:
    """Records the names of the clips that are read."""
    names, real = [], storage.read
    monkeypatch.setattr(storage, "read", lambda path: (names.append(Path(path).name), real(path))[1])
    return names


def line(name: str, **more: str) -> str:
    return json.dumps({"id": name, "video": f"{name}.mov", "caption": "c"} | more) + "\n"


def prepared(out: Path) -> dict[str, str]:
    source = open_shards(str(out), READING)
    records = [source[number] for number in range(len(source))]
    assert [record.fields["id"] for record in records] == source.index.ids
    return {record.fields["id"]: record.fields["caption"] for record in records}


def test_edited_manifest_is_prepared_after_too_many_rejects(tmp_path, clip_bytes, in_process, read):
    for number in range(4):
        (tmp_path / f"{number}.mov").write_bytes(clip_bytes[number])
    (tmp_path / "broken.mov").write_bytes(b"not yet copied")
    manifest, out = tmp_path / "clips.jsonl", tmp_path / "out"
    manifest.write_text(line("0") + "{mistake\n" + line("1") + line("2", video="nosuch.mov") + line("broken"))
    wanted = Job(str(manifest), str(out), shard_records=2, reading=READING)
    assert not prepare(wanted, 1).complete
    (tmp_path / "broken.mov").write_bytes(clip_bytes[0])  # its line stays
    assert [reject.line for reject in prepare(wanted, 1).rejects] == [2, 4]
    shards = {path: path.read_bytes() for path in out.glob("shard-*")}

    manifest.write_text(line("3") + line("0") + line("1", caption="better") + line("2") + line("broken"))
    read.clear()
    done = prepare(wanted, 1)
    assert (done.records, done.rejects, done.complete) == (5, [], True)
    assert sorted(name for name in read if name.endswith(".mov")) == ["1.mov", "2.mov", "3.mov"]
    assert prepared(out) == dict.fromkeys(("0", "2", "3", "broken"), "c") | {"1": "better"}
    assert {path: path.read_bytes() for path in shards} == shards
    assert prepare(wanted, 1).records == 5


def test_stopped_run_over_an_edited_manifest_resumes(tmp_path, clip_bytes, in_process, monkeypatch):
    for number in range(3):
        (tmp_path / f"{number}.mov").write_bytes(clip_bytes[number])
    manifest, out = tmp_path / "clips.jsonl", tmp_path / "out"
    manifest.write_text(line("0") + "{\n{\n")
    wanted = Job(str(manifest), str(out), shard_records=1, reading=READING)
    assert not prepare(wanted, 1).complete
    manifest.write_text(line("1") + line("0") + line("2"))
    real = storage.write

    def write(path, data):
        if path.endswith("manifest.json"):
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(storage, "write", write)
    with pytest.raises(KeyboardInterrupt):
        prepare(wanted, 1)
    monkeypatch.setattr(storage, "write", real)
    assert (prepare(wanted, 1).records, prepared(out)) == (3, dict.fromkeys("012", "c"))


def test_complete_folder_accepts_corrections_of_rejected_lines_only(tmp_path, clip_bytes, in_process):
    for number in range(2):
        (tmp_path / f"{number}.mov").write_bytes(clip_bytes[number])
    manifest, out = tmp_path / "clips.jsonl", tmp_path / "out"
    manifest.write_text("{\n" + line("0"))
    wanted = Job(str(manifest), str(out), reading=READING)
    assert prepare(wanted, 1, 0.5).complete
    manifest.write_text(line("1") + line("0"))
    assert (prepare(wanted, 1).records, prepared(out)) == (2, {"0": "c", "1": "c"})
    assert lines_of(out / "rejects.jsonl") == []
    before = {path: path.read_bytes() for path in out.iterdir()}
    manifest.write_text(line("1") + line("0", caption="another"))
    with pytest.raises(InputError, match="another manifest"):
        prepare(wanted, 1)
    assert {path: path.read_bytes() for path in out.iterdir()} == before

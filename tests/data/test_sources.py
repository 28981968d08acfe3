"""Reading prepared folders from a real storage server, with and without faults; tfds data sets."""

import json
import socket
from pathlib import Path

import gcs
import numpy as np
import pytest
import tfds_clips
from stream_fixtures import READING, recipe, write_manifest

from avocado_jax.data import storage
from avocado_jax.data.make_shard import Job
from avocado_jax.data.media import Reading
from avocado_jax.data.pipeline import batches, plan_batches
from avocado_jax.data.prepare import prepare
from avocado_jax.data.sources import open_shards, open_tfds
from avocado_jax.errors import InputError

CLIPS = 8


@pytest.fixture(scope="module")
def bucket(tmp_path_factory):
    """A proxy before a server with gs://clips-bucket/out: eight clips, prepared from a bucket into a bucket."""
    root = tmp_path_factory.mktemp("storage")
    (root / "clips-bucket").mkdir()
    local = tmp_path_factory.mktemp("local")
    write_manifest(local, CLIPS)
    with gcs.storage_server(root) as port, pytest.MonkeyPatch.context() as patch:
        proxy = gcs.Proxy(port)
        for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
            patch.setenv(name, proxy.url)
        storage._client.cache_clear()
        for path in ("clips.jsonl", *(f"clips/{number:03d}.mp4" for number in range(CLIPS))):
            storage.write(f"gs://clips-bucket/{path}", (local / path).read_bytes())
        job = Job("gs://clips-bucket/clips.jsonl", "gs://clips-bucket/out", shard_records=3, reading=READING)
        assert prepare(job, workers=2).complete
        assert prepare(
            Job(str(local / "clips.jsonl"), str(local / "out"), shard_records=3, reading=READING), 1
        ).complete
        proxy.root, proxy.local = root / "clips-bucket", local
        yield proxy
        proxy.close()
    storage._client.cache_clear()


@pytest.fixture
def faulty(bucket):
    """The proxy; faults are removed afterwards."""
    yield bucket
    bucket.faulty = lambda method, path: False
    bucket.faults, bucket.every = gcs.FAULTS, 2
    bucket.hits = dict.fromkeys(gcs.FAULTS, 0)


def stream(folder, steps=4, workers=0, cache_dir=None):
    source = open_shards(str(folder), READING, cache_dir)
    settings = recipe(group=2)
    plan = plan_batches(source.index, settings, 4, 2, seed=0)
    return list(batches(source, plan, settings, 0, steps, range(4), workers))


def assert_rows_equal(one, two):
    assert [batch[:5] + batch[9:] for batch in one] == [batch[:5] + batch[9:] for batch in two]
    for first, second in zip(one, two):
        for left, right in zip(
            (*first.clip, *first.captions, *first[7:9]), (*second.clip, *second.captions, *second[7:9])
        ):
            np.testing.assert_array_equal(left, right)


def test_bucket_has_the_same_bytes_as_a_folder(bucket):
    files = {path.name: path.read_bytes() for path in (bucket.local / "out").iterdir()}
    assert {name: storage.read(f"gs://clips-bucket/out/{name}") for name in files} == files
    assert not storage.exists("gs://clips-bucket/out/parts/job.json")
    assert storage.fingerprint("gs://clips-bucket/out/index-00000.npz") == storage.fingerprint(
        str(bucket.local / "out" / "index-00000.npz")
    )


def test_reads_with_faults_return_the_same_rows(faulty, tmp_path):
    """Every kind of fault on reads of the index, of records in place, and of shards into the cache."""
    truth = stream(faulty.local / "out")
    assert not any(batch.lost for batch in truth)
    faulty.faulty, faulty.every = lambda method, path: method == "GET", 3
    assert_rows_equal(truth, stream("gs://clips-bucket/out"))
    assert_rows_equal(truth, stream("gs://clips-bucket/out", workers=1, cache_dir=tmp_path))
    assert all(faulty.hits.values())


def test_uploads_survive_faults(faulty):
    faulty.faulty, faulty.every = lambda method, path: method == "POST", 2
    job = Job("gs://clips-bucket/clips.jsonl", "gs://clips-bucket/again", shard_records=3, reading=READING)
    assert prepare(job, workers=1).complete
    assert all(faulty.hits.values())
    for path in (faulty.local / "out").iterdir():
        assert storage.read(f"gs://clips-bucket/again/{path.name}") == path.read_bytes()


def test_permanent_storage_failure_loses_rows_and_then_stops_the_run(faulty):
    faulty.faulty, faulty.every, faulty.faults = lambda method, path: "shard-" in path, 1, ("truncated",)
    source = open_shards("gs://clips-bucket/out", READING, patience=1.0)
    with pytest.raises(storage.StorageError, match="gs://clips-bucket/out/shard-00000-00000"):
        source[0]


def test_missing_or_swapped_shard_is_refused(faulty, tmp_path):
    for path in (faulty.local / "out").iterdir():
        if "shard-00000-00001" not in path.name:
            storage.write(f"gs://clips-bucket/missing/{path.name}", path.read_bytes())
    source = open_shards("gs://clips-bucket/missing", READING, patience=1.0)
    assert source[0].fields["id"] == "clip-0"
    with pytest.raises(storage.StorageError, match="0 records, where manifest"):
        source[3]

    shards = sorted((faulty.local / "out").glob("shard-*"))
    storage.write(f"gs://clips-bucket/missing/{shards[1].name}", shards[0].read_bytes())
    with pytest.raises(InputError, match="unlike the index"):
        open_shards("gs://clips-bucket/missing", READING, patience=1.0)[3]
    with pytest.raises(storage.StorageError, match="checksum"):
        open_shards("gs://clips-bucket/missing", READING, cache_dir=tmp_path, patience=1.0)[3]
    assert not [path for path in tmp_path.iterdir() if path.name.endswith((".part", ".array_record"))]


def test_invalid_folders_are_refused(bucket, tmp_path):
    for folder in (str(tmp_path), "gs://clips-bucket/none", "gs://no-such-bucket/none"):
        with pytest.raises(InputError, match=r"manifest\.json"):
            open_shards(folder, READING)
    with pytest.raises(InputError, match="run prepare again"):
        open_shards(str(bucket.local / "out"), Reading())
    for name, change in (("version", 1), ("shards", 3), ("index_md5", "")):
        manifest = json.loads((bucket.local / "out" / "manifest.json").read_text()) | {name: change}
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        (tmp_path / "index-00000.npz").write_bytes((bucket.local / "out" / "index-00000.npz").read_bytes())
        with pytest.raises(InputError):
            open_shards(str(tmp_path), READING)


def test_unresponsive_storage_times_out(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as silent:  # accepts connections and never responds
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setattr(storage, "TIMEOUT", (0.5, 0.5))
        monkeypatch.setattr(storage, "PATIENCE", 1.0)
        storage._client.cache_clear()
        with pytest.raises(storage.StorageError, match="gs://clips-bucket/out/manifest"):
            open_shards("gs://clips-bucket/out", READING)
    storage._client.cache_clear()


def test_tfds_data_set_on_disk_and_in_a_bucket(bucket, tmp_path):
    builder = tfds_clips.TinyClips(str(bucket.local / "clips.jsonl"), data_dir=str(tmp_path))
    builder.download_and_prepare()
    folder = Path(builder.data_dir)
    for path in folder.iterdir():
        storage.write(f"gs://clips-bucket/tfds/tiny_clips/1.0.0/{path.name}", path.read_bytes())
    prepared = open_shards(str(bucket.local / "out"), READING)
    known = {prepared.index.ids[number]: number for number in range(CLIPS)}
    for where in (str(folder), "gs://clips-bucket/tfds/tiny_clips/1.0.0"):
        source = open_tfds(where, "train", READING, tmp_path / "cache")
        assert sorted(source.index.ids) == sorted(known)
        for number, name in enumerate(source.index.ids):
            record, same = source[number], prepared[known[name]]
            assert record.clip == same.clip
            assert record.fields == same.fields | {"seconds": 1.0}
            assert source.index.mel[number] == prepared.index.mel[known[name]]
        settings = recipe()
        plan = plan_batches(source.index, settings, 4, 2, seed=0)
        rows = list(batches(source, plan, settings, 0, plan.epoch_steps, range(4)))
        assert sorted(name for batch in rows for name in batch.ids if name) == sorted(known)
        assert not any(batch.lost for batch in rows)
    with pytest.raises(InputError, match="not a tfds data set"):
        open_tfds(str(tmp_path / "none"), "train", READING, tmp_path / "cache")

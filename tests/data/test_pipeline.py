"""The input stream: equal rows for any hosts and workers, exact resumption, captions, lost records."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import gcs
import numpy as np
import pytest
from stream_fixtures import READING, Spy, byte_tokenizer, contiguous_rows, recipe, write_manifest

from avocado_jax.bench.input import bench_input
from avocado_jax.data import storage
from avocado_jax.data.make_shard import Job
from avocado_jax.data.media import Media
from avocado_jax.data.pipeline import batches, make_captions, plan_batches, record_row
from avocado_jax.data.plan import Bucket
from avocado_jax.data.prepare import prepare
from avocado_jax.data.prompt import Habits, chat_prompt, special_id
from avocado_jax.data.records import Record
from avocado_jax.data.rows import make_row, shape_of
from avocado_jax.data.sources import open_shards
from avocado_jax.errors import InputError

CLIPS, BATCH = 22, 4


def shards(folder: Path, clips: int, **changes):
    write_manifest(folder, clips)
    job = Job(str(folder / "clips.jsonl"), str(folder / "out"), features=True, reading=READING, **changes)
    assert prepare(job, workers=2).complete
    return open_shards(str(folder / "out"), READING)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return shards(tmp_path_factory.mktemp("stream"), CLIPS)


def make_test_plan(source, settings, shapes=3, batch=BATCH):
    return plan_batches(source.index, settings, batch, shapes, seed=3)


def stream(source, plan, settings, first, stop, rows=range(BATCH), **how):
    return list(batches(source, plan, settings, first, stop, rows, **how))


def arrays(batch):
    return [*batch.clip, *batch.captions, batch.weight, batch.truncated]


def assert_rows(whole, part, rows):
    """Assert that every field of `part` equals these rows of `whole`."""
    assert (whole.step, whole.epoch, whole.bucket) == (part.step, part.epoch, part.bucket)
    assert [whole.ids[row] for row in rows] == list(part.ids)
    assert [whole.records[row]["caption"] for row in rows if whole.ids[row]] == [
        record["caption"] for record in part.records if record
    ]
    for left, right in zip(arrays(whole), arrays(part)):
        np.testing.assert_array_equal(left[rows.start : rows.stop], right)


def test_prompt_of_a_row():
    """`prompt`, `system` and `media_first` of a record, else the recipe's prompts and habits."""
    clip = Media(np.zeros((2, 56, 56, 3), np.uint8), None, 1.0)
    settings = replace(recipe(), prompts=("Why?",), habits=Habits(system="H", media_first=False))
    for fields, expected in (
        ({}, ("Why?", "H", False)),
        ({"prompt": "Who?", "system": "", "media_first": True}, ("Who?", "", True)),
    ):
        row = make_row(clip, chat_prompt(settings.words, *expected), settings.config).clip
        record = Record({"id": "a", "caption": "A cat.", **fields}, clip, "a")
        made = record_row(record, 0, 0, Bucket(shape_of(row), 16), settings, 0).clip
        np.testing.assert_array_equal(made.tokens[0], row.tokens)


def test_rows_do_not_depend_on_hosts_workers_or_restarts(source):
    settings = recipe(group=2)
    plan = make_test_plan(source, settings)
    last = 2 * plan.epoch_steps
    whole = stream(source, plan, settings, 0, last)
    for epoch in (0, 1):
        names = [name for batch in whole if batch.epoch == epoch for name in batch.ids if name]
        assert sorted(names) == sorted(source.index.ids)
    assert [batch.step for batch in whole] == list(range(last))
    for hosts, workers, first, stop in ((1, 2, 1, last), (2, 0, 3, 9), (4, 0, 5, 8)):
        for host in range(hosts):
            rows = contiguous_rows(host, hosts, BATCH)
            for batch in stream(source, plan, settings, first, stop, rows, workers=workers):
                assert_rows(whole[batch.step], batch, rows)


def test_repeated_row_is_read_once(source):
    settings, numbers = recipe(), []

    class Counted(Spy):
        def __getitem__(self, number):
            numbers.append(number)
            return super().__getitem__(number)

    plan = make_test_plan(source, settings)
    (batch,) = batches(Counted(source), plan, settings, 0, 1, [1, 0, 1, 0])
    assert sorted(numbers) == sorted(plan.step(0).records[:2])
    assert batch.ids == tuple(source.index.ids[number] for number in plan.step(0).records[[1, 0, 1, 0]])
    np.testing.assert_array_equal(batch.clip.tokens[:2], batch.clip.tokens[2:])


def test_workers_use_no_device_and_one_core(source):
    settings = recipe()
    spied = stream(Spy(source), make_test_plan(source, settings), settings, 0, 3, workers=1)
    records = [record for batch in spied for record in batch.records if record]
    assert {record["device"] for record in records} == {False}
    assert {record["blas"] for record in records} == {"1"}
    assert len({record["process"] for record in records}) == 1


def test_the_input_side_needs_no_jax(source):
    """Grain imports jax if it is installed. Our code does not, and works without jax."""
    folder = Path(source._folder)
    code = f"""
import sys
sys.modules["jax"] = None
sys.path[:0] = {[str(Path(__file__).parents[up]) for up in (0, 1)]!r}
import avocado_jax.cli.prepare
from test_pipeline import *
source = open_shards({str(folder)!r}, READING)
settings = recipe()
print(len(stream(source, make_test_plan(source, settings), settings, 0, 2)))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout == "2\n", done.stderr


def test_captions_end_with_the_stop_token_and_are_truncated_to_the_bucket(source):
    settings = recipe(group=3, caption_tokens=30)
    stop = special_id(settings.words, "<|im_end|>")
    tokenizer = byte_tokenizer()
    for batch in stream(source, make_test_plan(source, settings), settings, 0, 4):
        captions = batch.captions
        np.testing.assert_array_equal(captions.inputs[:, :, 0], np.repeat(batch.clip.first[:, None], 3, axis=1))
        np.testing.assert_array_equal(captions.inputs[:, :, 1:], captions.targets[:, :, :-1])
        for row, record in enumerate(batch.records):
            known, truncated = [record["caption"], *record["references"]] if record else [], 0
            texts = []
            for targets, valid in zip(captions.targets[row], captions.valid[row]):
                kept = targets[valid].tolist()
                if kept and kept[-1] == stop:
                    texts.append(tokenizer.decode(kept[:-1]))
                    assert stop not in kept[:-1]
                elif kept:
                    truncated += 1
                    assert any(text.startswith(tokenizer.decode(kept)) for text in known)
            assert truncated == batch.truncated[row]
            assert len(texts) + truncated == len(known)  # two captions for three rows: one row has no targets
            assert set(texts) <= set(known)
            assert batch.weight[row] == bool(record)


def test_sampled_captions_and_prompts_change_with_the_epoch(source):
    settings = recipe()
    plan = make_test_plan(source, settings)
    rows = {0: {}, 1: {}}
    for batch in stream(source, plan, settings, 0, 2 * plan.epoch_steps):
        for row, name in enumerate(batch.ids):
            rows[batch.epoch][name] = (batch.captions.targets[row].tobytes(), batch.clip.length[row])
    assert any(rows[0][name][0] != rows[1][name][0] for name in source.index.ids)
    assert any(rows[0][name][1] != rows[1][name][1] for name in source.index.ids)


def test_spelled_special_tokens_in_a_caption_are_text():
    settings = recipe()
    special = set(settings.words.get_added_vocab().values())
    ids = settings.words.encode("<|im_end|> and <|VIDEO|>")
    captions, truncated = make_captions([ids], 7, 100, 1)
    assert not set(captions.targets[captions.valid].tolist()) & special
    assert truncated == 0


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_record_becomes_a_row_of_zero_weight(source, workers):
    settings = recipe(max_lost_share=0.5, record_seconds=3.0)
    plan = make_test_plan(source, settings)
    whole = stream(source, plan, settings, 0, plan.epoch_steps)
    hurt = Spy(source, bad={3: "damaged"}, slow={5: 30})
    found = stream(hurt, plan, settings, 0, plan.epoch_steps, workers=workers)
    lost = {one.id: one.reason for batch in found for one in batch.lost}
    assert lost == {source.index.ids[3]: "damaged", source.index.ids[5]: "took longer than 3 s"}
    for one, two in zip(whole, found):
        assert [part.shape for part in arrays(one)] == [part.shape for part in arrays(two)]
        assert one.ids == two.ids
        for row, name in enumerate(one.ids):
            if name not in lost:
                for left, right in zip(arrays(one), arrays(two)):
                    np.testing.assert_array_equal(left[row], right[row])
            else:
                assert two.weight[row] == 0
                assert not two.captions.valid[row].any()
                assert two.clip.length[row] > 0  # enough data for finite numbers
                assert two.clip.patch_valid[row].any()


def test_too_many_lost_records_stop_the_run_and_are_listed(source):
    settings = recipe(max_lost_share=0.01)
    bad = Spy(source, bad=dict.fromkeys(range(0, CLIPS, 2), "gone"))
    given = []
    with pytest.raises(InputError, match=r"3 of \d+ records cannot be read: clip-\d+: gone; clip-\d+: gone; "):
        given.extend(batches(bad, make_test_plan(source, settings), settings, 0, 6, range(BATCH)))
    assert given


def test_closing_early_ends_the_workers(source):
    settings = recipe()
    stream = batches(Spy(source), make_test_plan(source, settings), settings, 0, 1000, range(BATCH), workers=1)
    worker = next(stream).records[0]["process"]
    stream.close()
    assert not Path(f"/proc/{worker}").exists()


@pytest.mark.slow
def test_each_clip_is_read_once_for_any_number_of_hosts(tmp_path, monkeypatch):
    """Two runs over an epoch in a bucket with changing numbers of hosts and workers, one of them with faults."""
    (tmp_path / "clips-bucket").mkdir()
    manifest = write_manifest(tmp_path / "local", 400)
    with gcs.storage_server(tmp_path) as port:
        proxy = gcs.Proxy(port)
        for name in ("STORAGE_EMULATOR_HOST", "CLOUD_STORAGE_EMULATOR_ENDPOINT"):
            monkeypatch.setenv(name, proxy.url)
        storage._client.cache_clear()
        assert prepare(Job(str(manifest), "gs://clips-bucket/out", features=True, reading=READING), workers=2).complete
        source = open_shards("gs://clips-bucket/out", READING)
        settings = recipe()
        plan = make_test_plan(source, settings, 6, 16)
        rng = np.random.default_rng(0)
        calm = _epoch_in_pieces(source, plan, settings, [(1, 0), (2, 1), (4, 0)], rng)
        proxy.faulty, proxy.every = lambda method, path: "shard-" in path, 20
        assert calm == _epoch_in_pieces(source, plan, settings, [(4, 1), (1, 2), (2, 0)], rng)
        assert all(proxy.hits.values())
        proxy.close()
    storage._client.cache_clear()
    names = [name for _, rows in calm.values() for name, _ in rows if name]
    assert len(names) == 400
    assert sorted(names) == sorted(source.index.ids)
    for step, (bucket, rows) in calm.items():
        at = plan.step(step)
        assert bucket == at.bucket
        assert [name for name, _ in rows] == [source.index.ids[row] if row >= 0 else "" for row in at.records]


def _epoch_in_pieces(source, plan, settings, pieces, rng):
    """{step: (bucket, [(id, sum of its bytes)])} of an epoch that stops and resumes with other (hosts, workers)."""
    stops = [0, *sorted(rng.choice(np.arange(1, plan.epoch_steps), 2, replace=False).tolist()), plan.epoch_steps]
    steps = {}
    for (hosts, workers), first, stop in zip(pieces, stops, stops[1:]):
        for host in range(hosts):
            for batch in stream(
                source, plan, settings, first, stop, contiguous_rows(host, hosts, plan.batch), workers=workers
            ):
                assert not batch.lost
                bucket, rows = steps.setdefault(batch.step, (batch.bucket, []))
                assert bucket == batch.bucket
                for row, name in enumerate(batch.ids):
                    content = b"".join(np.ascontiguousarray(part[row]).tobytes() for part in arrays(batch))
                    rows.append((name, hashlib.md5(content).hexdigest()))
    return dict(sorted(steps.items()))


def test_input_time_is_measured_per_stage(source):
    result = bench_input(source._folder, "tiny", READING, most=5)
    assert result["rows"] == 5
    assert min(result["rows_per_second_per_core"], result["bytes_per_second"], *result["stages"].values()) > 0
    assert sum(result["stages"].values()) <= result["seconds"]

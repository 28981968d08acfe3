"""`caption` over collections: inputs of every kind, resumed outputs, shards. The model is a stub; clips are read."""

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from clips import GOOD
from gcs import Proxy, storage_server
from jax.sharding import PartitionSpec

from avocado_jax.__main__ import main
from avocado_jax.bench.measure import Ceilings
from avocado_jax.checkpoint.load import SHIPPED
from avocado_jax.cli import caption as command
from avocado_jax.data import appended, storage
from avocado_jax.data.clips import ClipSource, list_clips
from avocado_jax.data.shard import parse_shard
from avocado_jax.errors import InputError
from avocado_jax.eval.captioner import captioning_mesh
from avocado_jax.parallel import compiled
from avocado_jax.planning import estimate
from avocado_jax.sampling import outputs
from avocado_jax.sampling.engine import Engine
from avocado_jax.sampling.logits import Sampling
from avocado_jax.sampling.segments import Segment, digest


class Killed(BaseException):
    """Simulates kill -9: no later code runs, except for the release of the lock."""


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """A folder with two good clips in a subfolder, a silent one, a broken one, and other files."""
    folder = tmp_path_factory.mktemp("clips")
    (folder / "b").mkdir()
    GOOD["plain.mp4"](folder / "b" / "plain.mp4")
    GOOD["no_sound.mp4"](folder / "a silent.mp4")
    shutil.copy(folder / "b" / "plain.mp4", folder / "c.mkv")
    (folder / "broken.mp4").write_bytes(b"no video")
    (folder / "notes.txt").write_text("not a clip")
    return folder


@pytest.fixture
def stub(monkeypatch):
    """A stub whose captions state their inputs. The run ends before the clip with number `stop`."""

    class Stub(Engine):
        stop, runs = 10**6, []

        def run(self, requests):
            for count, (request, row, number) in enumerate(requests):
                if count == Stub.stop:
                    raise Killed
                Stub.runs.append(request.clip.name)
                if isinstance(row, Exception):
                    yield request, row
                    continue
                text = f"{number} {self.sampling.temperature} {self.length} {self.seed}"
                yield request, np.array([*text.encode(), self.captioner.stops[0]], np.int32)

    monkeypatch.setattr(command, "Engine", Stub)
    Stub.stop, Stub.runs = 10**6, []
    return Stub


def lines(path):
    return [json.loads(line) for line in storage.read(str(path)).splitlines()]


def run(*arguments, status=0):
    assert main(["caption", *map(str, arguments)]) == status


def list_names(inputs, **options):
    return [clip.name for clip in list_clips([str(one) for one in inputs], **options)]


def test_list_inputs(clips, tmp_path, monkeypatch):
    found = [str(clips / name) for name in ("a silent.mp4", "broken.mp4", "c.mkv", "b/plain.mp4")]
    assert list_names([clips]) == found
    assert list_names([f"{clips}/**/*.mp4"]) == sorted(name for name in found if name.endswith("mp4"))
    assert list_names([found[3], "missing.mp4", found[3]]) == [found[3], "missing.mp4", found[3]]
    (tmp_path / "manifest.jsonl").write_text(
        json.dumps({"id": "one", "video": found[3], "prompt": "Who?", "system": "", "media_first": False})
        + '\n\n{"video": "x.mp4"}\n{"vid": 3}\n{\n'
    )
    manifest = list_clips([], str(tmp_path / "manifest.jsonl"))
    assert [(one.name, one.path, bool(one.error)) for one in manifest] == [
        ("one", found[3], False),
        ("x.mp4", str(tmp_path / "x.mp4"), False),
        (f"{tmp_path}/manifest.jsonl:4", "", True),
        (f"{tmp_path}/manifest.jsonl:5", "", True),
    ]
    assert manifest[0].fields == {"prompt": "Who?", "system": "", "media_first": False}
    (tmp_path / "empty").mkdir()
    for nothing in ("empty", "*.webm"):
        with pytest.raises(InputError, match="no video in it"):
            list_clips([str(tmp_path / nothing)])


def test_large_folder_is_listed_once(tmp_path, monkeypatch):
    for number in range(300):
        (tmp_path / f"{number}.mp4").touch()
    monkeypatch.setattr(Path, "stat", None)  # no request per name
    assert len(list_names([tmp_path])) == 300


@pytest.mark.parametrize("stop", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_stopped_run_resumes_to_the_same_bytes(clips, tmp_path, stub, capsys, stop):
    """Each occurrence has one line, in input order, including errors. A resumed run uses the options of the first."""
    given = [clips, clips / "b" / "plain.mp4", "--checkpoint", os.fspath(SHIPPED), "--seed", "7"]
    run(*given, "--out", tmp_path / "undisturbed.jsonl")
    expected = (tmp_path / "undisturbed.jsonl").read_bytes()
    assert [line["clip"] for line in lines(tmp_path / "undisturbed.jsonl")] == list_names(
        [clips, clips / "b" / "plain.mp4"]
    )
    assert list(lines(tmp_path / "undisturbed.jsonl")[0]) == ["clip", "caption", "seconds", "audio", "truncated"]
    stub.stop, stub.runs[:] = stop, []
    out = tmp_path / "out.jsonl"
    with pytest.raises(Killed):
        run(*given, "--out", out)
    assert expected.startswith(out.read_bytes())
    with out.open("ab") as file:
        file.write(b'{"clip": "half a li')
    stub.stop = 10**6
    run(*given, "--out", out)
    assert out.read_bytes() == expected
    assert len(stub.runs) == 5
    capsys.readouterr()
    run(*given, "--out", out)
    assert "5 clips, 5 of them are in" in capsys.readouterr().err
    assert len(stub.runs) == 5
    assert main(["caption", *map(str, given), "--out", str(out), "--temperature", "0.5"]) == 2
    assert "temperature 0.0 (now 0.5)" in capsys.readouterr().err


def test_captions_of_shards_and_failed_clips(clips, tmp_path, stub, capsys, monkeypatch):
    """Two shards together equal one run. Failed clips are captioned again only on request."""
    given = [clips, "--checkpoint", os.fspath(SHIPPED), "--ids"]
    for shard in ("0/2", "1/2"):
        run(*given, "--out", f"{tmp_path}/parts/", "--shard", shard)
    run(*given, "--out", f"{tmp_path}/all/")
    assert "broken.mp4: not a video" in capsys.readouterr().err
    parts = [line for path in sorted((tmp_path / "parts").glob("*.jsonl")) for line in lines(path)]
    whole = [line for path in sorted((tmp_path / "all").glob("*.jsonl")) for line in lines(path)]
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == [
        "captions-0-of-1.jsonl", "options-0-of-1.json", "rejects-0-of-1.jsonl"
    ]  # fmt: skip
    assert sorted(parts, key=str) == sorted(whole, key=str)
    assert [len(line.get("token_ids", ())) > 3 for line in whole] == [True] * 3 + [False]
    (reject,) = lines(tmp_path / "all" / "rejects-0-of-1.jsonl")
    assert list(reject) == ["clip", "error"]
    before = len(stub.runs)
    run(*given, "--out", f"{tmp_path}/all/")
    assert len(stub.runs) == before
    run(*given, "--out", f"{tmp_path}/all/", "--retry-failed")
    assert stub.runs[before:] == [reject["clip"]]
    assert lines(tmp_path / "all" / "rejects-0-of-1.jsonl") == [reject]
    monkeypatch.setattr(estimate, "ceilings", lambda _: Ceilings(1e12, 1e11))
    run(*given, "--out", f"{tmp_path}/none/", "--dry-run", "--batch", "4")
    error = capsys.readouterr().err
    assert "4 clips, 0 of them are in" in error
    assert "estimate, from 3 clips of" in error
    assert "4 clips take" in error
    assert len(stub.runs) == before + 1


def test_captions_to_a_bucket(clips, tmp_path, stub, monkeypatch, capsys):
    """From and to a bucket with server faults and a kill between two appends: the bytes equal those of a local run."""
    (tmp_path / "root" / "bucket").mkdir(parents=True)
    monkeypatch.setattr(appended, "INTERVAL", 0.0)
    monkeypatch.chdir(tmp_path)
    with storage_server(tmp_path / "root") as port:
        proxy = Proxy(port)
        try:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            storage._client.cache_clear()
            prefix = "gs://bucket/clips/"
            for path in (path for path in clips.rglob("*") if path.is_file()):
                storage.write(prefix + str(path.relative_to(clips)), path.read_bytes())
            found = list_names([prefix])
            assert found == sorted(prefix + str(path.relative_to(clips)) for path in clips.rglob("*.m*"))
            assert list_names(["gs://bucket/clips/**.mp4"]) == [name for name in found if name.endswith(".mp4")]
            assert list_names([found[0]]) == [found[0]]
            given = [prefix, "--checkpoint", os.fspath(SHIPPED)]
            run(*given, "--out", f"{tmp_path}/local/")
            proxy.faulty = lambda method, path: "captions-" in path or "/clips" in path
            proxy.every = 3
            stub.stop = 2
            with pytest.raises(Killed):
                run(*given, "--out", "gs://bucket/out/")
            stub.stop = 10**6
            run(*given, "--out", "gs://bucket/out/")
            assert sum(proxy.hits.values()) > 3
            for name in ("captions-0-of-1.jsonl", "rejects-0-of-1.jsonl"):
                assert storage.read(f"gs://bucket/out/{name}") == (tmp_path / "local" / name).read_bytes()
            assert storage.names("gs://bucket/out") == [
                "captions-0-of-1.jsonl", "options-0-of-1.json", "rejects-0-of-1.jsonl"
            ]  # fmt: skip
        finally:
            proxy.close()
            storage._client.cache_clear()


def test_append_with_a_lost_response_happens_once(tmp_path, monkeypatch):
    (tmp_path / "bucket").mkdir()
    with storage_server(tmp_path) as port:
        proxy = Proxy(port)
        try:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", proxy.url)
            storage._client.cache_clear()
            storage.append("gs://bucket/a.jsonl", b"one\n", 0)
            proxy.faulty, proxy.every, proxy.faults = (lambda method, path: "compose" in path), 2, ("reset",)
            storage.append("gs://bucket/a.jsonl", b"two\n", 4)
            storage.append("gs://bucket/a.jsonl", b"three\n", 8)
            assert proxy.hits["reset"] >= 1
            assert storage.read("gs://bucket/a.jsonl") == b"one\ntwo\nthree\n"
            with pytest.raises(storage.StorageError, match="has 14 bytes instead of 3: another process"):
                storage.append("gs://bucket/a.jsonl", b"x", 3)
        finally:
            proxy.close()
            storage._client.cache_clear()


def test_shard_numbers_are_detected():
    assert parse_shard(None) == (0, 1)
    assert parse_shard("2/3") == (2, 3)
    for wrong in ("3/3", "x", "1", "-1/3", "1/2/3"):
        with pytest.raises(InputError, match="not I/N with I from 0"):
            parse_shard(wrong)
    assert parse_shard("auto", {"SKYPILOT_NODE_RANK": "1", "SKYPILOT_NUM_NODES": "4"}) == (1, 4)
    assert parse_shard("auto", {"SLURM_PROCID": "3", "SLURM_NTASKS": "8"}) == (3, 8)
    assert parse_shard("auto", {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"}) == (0, 2)
    assert parse_shard("auto", {"TPU_WORKER_ID": "1", "TPU_WORKER_HOSTNAMES": "a,b"}) == (1, 2)
    one_host = {"TPU_WORKER_ID": "0", "TPU_WORKER_HOSTNAMES": "localhost"}
    with pytest.raises(InputError, match="none of these is set"):
        parse_shard("auto", one_host)
    with pytest.raises(InputError, match="none of these is set"):
        parse_shard("auto", {})


def test_options_reach_the_engine(clips, tmp_path, stub, monkeypatch):
    """The options reach an engine on eight devices; a resumed run has the cache size of the first."""
    engines = []
    real = stub.run
    monkeypatch.setattr(stub, "run", lambda self, requests: (engines.append(self), real(self, requests))[1])
    clip = clips / "b" / "plain.mp4"
    given = ["--checkpoint", os.fspath(SHIPPED), "--max-new-tokens", "9", "--seed", "4"]
    given += ["--temperature", "0.5", "--top-p", "0.9", "--top-k", "7", "--dtype", "bfloat16", "--prompt", "Who?"]
    for memory, more in ((1000, []), (2000, [clip])):
        monkeypatch.setattr(command, "free_cache_bytes", lambda _, memory=memory: memory)
        run(clip, *more, *given, "--out", tmp_path / "out.jsonl", "--mesh", "4,2")
    run(clip, *given, "--batch", "3", "--no-audio", "--align-sound")
    first, second, alone = engines
    assert first.sampling == alone.sampling == Sampling(0.5, 7, 0.9)
    assert (first.length, first.seed, first.captioner.config.dtype, first.captioner.question) == (
        9,
        4,
        "bfloat16",
        "Who?",
    )
    assert dict(first.mesh.shape) == {"data": 4, "fsdp": 1, "tensor": 2}
    kernel = first.captioner.params["text"]["layers_0"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec(None, "tensor")
    assert (first._slots, first._cache_bytes, second._cache_bytes) == (None, 1000, 1000)
    assert (alone._slots, alone.mesh, alone.captioner.reading.align_sound) == (3, None, True)


def test_mesh_of_a_host(monkeypatch):
    """The fewest devices per replica that leave memory for caches; CPU devices share one machine."""
    assert captioning_mesh(10**12) is None
    monkeypatch.setattr("avocado_jax.eval.captioner.make_mesh", lambda *sizes, devices: (*sizes, len(devices)))
    for count, size, expected in (
        (8, 1, (8, 1, 1, 8)),
        (8, 40, (8, 1, 1, 8)),
        (8, 90, (4, 1, 2, 8)),
        (4, 190, (1, 1, 4, 4)),
        (8, 10**6, (1, 1, 8, 8)),
        (1, 1, None),
    ):
        device = SimpleNamespace(platform="tpu", memory_stats=lambda: {"bytes_limit": 100})
        monkeypatch.setattr("jax.local_devices", lambda count=count, device=device: [device] * count)
        assert captioning_mesh(size) == expected
    with pytest.raises(InputError, match="--mesh 2,1: there are 1 devices"):
        captioning_mesh(1, (2, 1))


def test_results_are_reordered():
    results = [([Segment(number, ClipSource(""))], number) for number in (7, 2, 9, 4)]
    assert [made for _, made in command._in_order(iter(results), [2, 4, 7, 9])] == [2, 4, 7, 9]


def test_repeated_clips_are_counted_per_occurrence(tmp_path):
    """Each line of the output counts as one occurrence."""
    (tmp_path / "out.jsonl").write_text('{"clip": "a", "caption": ""}\n{"clip": "a", "error": ""}\n{"clip": "b"}\n')
    options = {"batch": None}
    with outputs.CaptionFiles(str(tmp_path / "out.jsonl"), (0, 1), options, False) as files:
        assert files.finished == 3
        assert [files.take(clip) for clip in "abacaa"] == [True, True, True, False, False, False]
    with outputs.CaptionFiles(str(tmp_path / "out.jsonl"), (0, 1), options, True) as files:
        assert [files.take(clip) for clip in "aab"] == [True, False, True]


def test_storage_failures_do_not_mark_clips_as_failed(clips, tmp_path, stub, monkeypatch):
    """The run exits with 1, and the next start captions the clip."""

    def read(*_):
        raise storage.StorageError("gs://bucket/x: unavailable")

    clip, out = clips / "b" / "plain.mp4", tmp_path / "out.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(ClipSource, "read", read)
        run(clip, "--checkpoint", SHIPPED, "--out", out, status=1)
    assert out.read_bytes() == b""
    run(clip, "--checkpoint", SHIPPED, "--out", out)
    assert "caption" in lines(out)[0]


def test_consecutive_failures_stop_the_run(clips, tmp_path, stub, monkeypatch, capsys):
    """The run stops if more than half of the last four failed, unless --max-failed allows it. The output stays."""
    monkeypatch.setattr(command, "RECENT", 4)
    out, missing = tmp_path / "out.jsonl", [f"{number}.mp4" for number in range(6)]
    given = [*missing[:2], *[clips / "b" / "plain.mp4"] * 4, *missing[2:], "--checkpoint", SHIPPED, "--out", out]
    run(*given, status=3)
    assert ["error" in line for line in lines(out)] == [True] * 2 + [False] * 4 + [True] * 3
    error = capsys.readouterr().err
    assert "4 captions," in error
    assert "stopped: 3 of the last 4 clips failed, more than --max-failed 0.5; once" in error
    run(*given, "--max-failed", "1")
    assert len(lines(out)) == 10
    run(*given[:-1], tmp_path / "all.jsonl", "--max-failed", "1")
    assert len(lines(tmp_path / "all.jsonl")) == 10
    run(*missing, "--checkpoint", SHIPPED, status=2)  # on the terminal: all of them
    assert "stopped" not in capsys.readouterr().err
    run(*given, "--max-failed", "1.5", status=2)


def test_compiled_programs_are_logged_and_cached(clips, tmp_path, stub, monkeypatch, capsys):
    """With several clips, each program is logged before its first use. The cache is in the user's cache folder."""
    kept = []
    monkeypatch.setattr("avocado_jax.eval.captioner.use_user_cache", lambda: kept.append(1))
    real = stub.run

    def announced(self, requests):
        self._announce("prefill")
        self._announce("prefill")
        return real(self, requests)

    monkeypatch.setattr(stub, "run", announced)
    clip = clips / "b" / "plain.mp4"
    run(clip, "--checkpoint", SHIPPED)
    assert "prefill" not in capsys.readouterr().err
    run(clip, clip, "--checkpoint", SHIPPED)
    assert capsys.readouterr().err.count("first prefill: it is compiled, or read from the cache") == 1
    assert kept == [1, 1]


def test_folder_of_compiled_programs(tmp_path, monkeypatch):
    """Below XDG_CACHE_HOME or the home; none if it cannot be written."""
    used = []
    monkeypatch.setattr(compiled, "use_cache", used.append)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    compiled.use_user_cache()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "other"))
    compiled.use_user_cache()
    assert used == [f"{tmp_path}/.cache/avocado", f"{tmp_path}/other/avocado"]
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    compiled.use_user_cache()
    assert len(used) == 2


def test_missing_files_are_reported_before_the_model_loads(tmp_path, monkeypatch):
    """Each missing file gets a line; an empty shard counts as done."""
    monkeypatch.setattr(command, "load_captioner", None)
    out = tmp_path / "out.jsonl"
    run("a.mp4", "b.mp4", "--checkpoint", SHIPPED, "--out", out)
    assert [line["error"] for line in lines(out)] == ["a.mp4: no such file", "b.mp4: no such file"]
    (index,) = {number for number in (0, 1) if digest("a.mp4") % 2 != number}
    run("a.mp4", "--checkpoint", SHIPPED, "--out", f"{tmp_path}/empty/", "--shard", f"{index}/2")
    run("a.mp4", "--checkpoint", SHIPPED, "--out", f"{tmp_path}/nothing/", "--dry-run", "--retry-failed")
    assert not (tmp_path / "nothing").exists()

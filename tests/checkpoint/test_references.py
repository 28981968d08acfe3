"""Model references: downloads from the hub, resumption, offline mode and errors."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from gcs import proxied_bucket
from hub import TOKEN, forget, hub_server
from reference import write_reference
from safetensors.numpy import load_file, save_file

from avocado_jax.__main__ import main
from avocado_jax.checkpoint import references
from avocado_jax.checkpoint.convert import begin_run, from_hf, to_hf
from avocado_jax.checkpoint.load import identity, load_params, open_checkpoint, open_language_model
from avocado_jax.checkpoint.orbax import open_run
from avocado_jax.checkpoint.references import located, tokenizer_folder
from avocado_jax.data import storage
from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY

NAME, SHARDS = "ORG/captioner", 3


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A sharded checkpoint with an index, and unneeded files."""
    folder = tmp_path_factory.mktemp("published")
    write_reference(folder, TINY)
    write_tokenizer(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, where = sorted(tensors), {}
    for number in range(SHARDS):
        file = f"model-{number + 1:05d}-of-{SHARDS:05d}.safetensors"
        part = names[number::SHARDS]
        save_file({name: tensors[name] for name in part}, folder / file)
        where |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    (folder / "README.md").write_text("a card")
    (folder / "assets").mkdir()
    (folder / "assets" / "more.json").write_text("{}")
    save_file({"x": np.zeros(9)}, folder / "consolidated.safetensors")
    (folder / "pytorch_model.bin").write_bytes(b"a pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.3)
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add(NAME, published)
        yield hub


def shards_of(names: list[str]) -> list[str]:
    return sorted(name for name in names if name.endswith(".safetensors"))


def test_only_needed_files_are_downloaded_once(hub, published, capfd):
    checkpoint = open_checkpoint(NAME)
    assert len(checkpoint.tensors) == len(load_file_names(published))
    assert len(shards_of(hub.fetched())) == SHARDS
    assert not {"README.md", "more.json", "pytorch_model.bin", "modeling.py", "consolidated.safetensors"} & {
        *hub.fetched()
    }
    assert "downloading 3 shards" in capfd.readouterr().err
    count = len(hub.fetched())
    forget()
    assert open_checkpoint(NAME).folder == checkpoint.folder
    assert len(hub.fetched()) == count
    assert references.commit_of(checkpoint.folder) == f"{NAME}@{hub.repos['models', NAME].refs['main']}"


def load_file_names(folder: Path) -> list[str]:
    names = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    return [name for name in names if "audio_bos_eos" not in name]


def test_tokenizer_downloads_no_weights(hub):
    folder = tokenizer_folder(NAME)
    assert (folder / "tokenizer.json").is_file()
    assert set(hub.fetched()) <= set(references.TOKENIZER)


def test_revision_is_pinned(hub, published):
    repo = hub.repos["models", NAME]
    old = repo.refs["main"]
    repo.refs["v1"] = old
    new = repo.commit(repo.commits[old] | {"question.txt": b"What?"})
    for revision, commit in (("", new), ("@main", new), ("@v1", old), (f"@{old}", old)):
        assert Path(located(NAME + revision)).name == commit
    repo.refs["main"] = old  # a process resolves a reference once
    assert Path(located(NAME)).name == new


def test_run_stays_at_its_commit(hub, published, tmp_path):
    repo = hub.repos["models", NAME]
    old = repo.refs["main"]
    begin_run(NAME, tmp_path / "run")
    repo.commit(repo.commits[old] | {"question.txt": b"What?"})
    forget()
    assert references.pinned(NAME, str(tmp_path / "run")) == f"{NAME}@{old}"
    assert references.pinned("ORG/other", str(tmp_path / "run")) == "ORG/other"
    assert references.pinned(NAME, str(tmp_path / "new")) == NAME


def test_run_from_the_hub_has_the_copied_side_files(hub, tmp_path):
    """They come from the commit that was opened, although the branch has moved since."""
    repo = hub.repos["models", NAME]
    files = repo.commits[repo.refs["main"]]
    repo.commit(files | {"spk_dict.pt": b"voices", "LICENSE": b"terms"})
    open_checkpoint(NAME)
    assert not {"spk_dict.pt", "LICENSE"} & {*hub.fetched()}
    repo.commit(files | {"spk_dict.pt": b"others", "LICENSE": b"others"})
    begin_run(NAME, tmp_path / "run")
    assert (tmp_path / "run/hf/spk_dict.pt").read_bytes() == b"voices"
    assert (tmp_path / "run/hf/LICENSE").read_bytes() == b"terms"


def test_local_folder_takes_precedence_over_the_hub(hub, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = [name for name in os.listdir(published) if name.endswith((".json", "00003.safetensors"))]
    (tmp_path / NAME).mkdir(parents=True)
    for name in good:
        shutil.copyfile(published / name, tmp_path / NAME / name)
    assert str(open_checkpoint(NAME).folder) == NAME
    assert not [request for request in hub.requests if "api/models" in request.path]


def test_interrupted_download_resumes(hub, published, tmp_path, monkeypatch):
    """After a lost connection and after a kill, only the remaining bytes are requested."""
    from huggingface_hub import constants

    shard = f"model-00001-of-0000{SHARDS}.safetensors"
    interrupted = []
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)  # an incomplete chunk is discarded

    def fault(request):
        if request.origin == "cdn" and shard in request.path and not interrupted:
            interrupted.append(request)
            return "cut"
        return ""

    hub.faults = fault
    located(NAME)
    again = [request.range for request in hub.requests if request.origin == "cdn" and shard in request.path]
    size = (published / shard).stat().st_size
    assert again == ["", f"bytes={size // 2 // 1000 * 1000}-"]
    link = next((tmp_path / "home").rglob(shard))
    blob, data = link.resolve(), link.read_bytes()
    link.unlink()
    blob.unlink()  # as a killed process leaves it:
    blob.with_name(f"{blob.name}.part").write_bytes(data[:1000])
    hub.requests.clear()
    forget()
    located(NAME)
    assert [request.range for request in hub.requests if request.origin == "cdn"] == ["bytes=1000-"]
    assert blob.read_bytes() == data


def test_processes_sharing_a_cache_download_once(hub):
    """Hosts of a pod with a shared disk start at the same time, with slow downloads."""
    hub.faults = lambda request: time.sleep(0.3 * (request.origin == "cdn")) or ""
    command = [sys.executable, "-c", f"from avocado_jax.checkpoint.references import located; print(located({NAME!r}))"]
    hosts = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (host.communicate(timeout=120)[0] for host in hosts)
    assert first == second != ""
    assert len(shards_of(hub.fetched())) == SHARDS


def test_damaged_download_is_refused(hub, tmp_path):
    """Wrong bytes of an earlier attempt fail the checksum of the shard, and the next attempt starts from zero."""
    located(NAME)
    link = next((tmp_path / "home").rglob(f"model-00002-of-0000{SHARDS}.safetensors"))
    blob = link.resolve()
    link.unlink()
    blob.rename(blob.with_name(f"{blob.name}.part"))
    part = blob.with_name(f"{blob.name}.part")
    part.write_bytes(b"\0" * 500)
    forget()
    with pytest.raises(storage.StorageError, match="damaged"):
        located(NAME)
    forget()
    located(NAME)
    assert blob.is_file()


def test_offline_mode_uses_the_cache(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE"):
        located(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    folder = located(NAME)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    forget()
    assert located(NAME) == folder
    assert not hub.requests


@pytest.mark.parametrize(
    ("case", "status", "reason"),
    [
        ("missing", 2, "no such repository on the hub"),
        ("private", 2, "set HF_TOKEN"),
        ("token", 2, "does not accept the token"),
        ("gated", 2, "access is gated; accept the terms at"),
        ("forbidden", 2, "no access"),
        ("revision", 2, "no such revision"),
        ("429", 1, "the hub is busy (429)"),
        ("503", 1, "the hub is busy (503)"),
        ("network", 1, "cannot be reached"),
        ("truncated", 1, "arrived damaged|Consistency|cannot be reached"),
        ("short shard", 2, "does not fit its offsets or the file"),
        ("absent shard", 2, "has no 'model-00003-of-00003.safetensors'"),
        ("two shards", 2, "is in model-00001-of-00003.safetensors too"),
        ("no head", 2, "'lm_head.weight' is missing"),
    ],
)
def test_hub_and_storage_errors_are_one_line(hub, published, tmp_path, monkeypatch, capfd, case, status, reason):
    repo, reference = hub.repos["models", NAME], NAME
    files = repo.commits[repo.refs["main"]]
    if case == "missing":
        reference = "ORG/nothing"
    elif case in ("private", "gated"):
        repo.access = case
    elif case == "token":
        monkeypatch.setenv("HF_TOKEN", "hf_other")
    elif case == "forbidden":
        hub.faults = lambda request: "403"
    elif case == "revision":
        reference += "@v9"
    elif case.isdigit():
        hub.faults = lambda request: case
    elif case == "network":
        hub.close()
    elif case == "truncated":  # the network ends every shard early
        from huggingface_hub import file_download

        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)
        hub.faults = lambda request: "cut" if "00002-of" in request.path and request.origin == "cdn" else ""
    elif case == "short shard":
        name = "model-00002-of-00003.safetensors"
        repo.commit(files | {name: files[name][:-100]})
    elif case == "absent shard":
        repo.commit({name: data for name, data in files.items() if "00003-of" not in name})
    else:
        shard = {"two shards": 2, "no head": 1}[case]
        name = f"model-0000{shard}-of-00003.safetensors"
        where = json.loads(files["model.safetensors.index.json"])["weight_map"]
        if case == "no head":
            name = where.pop("lm_head.weight")
        tensors = load_file(published / name)
        if case == "no head":
            tensors.pop("lm_head.weight")
        else:
            other = load_file(published / "model-00001-of-00003.safetensors")
            tensors |= {next(iter(other)): next(iter(other.values()))}
        save_file(tensors, tmp_path / name)
        repo.commit(
            files
            | {
                name: (tmp_path / name).read_bytes(),
                "model.safetensors.index.json": json.dumps({"weight_map": where}).encode(),
            }
        )
    assert main(["convert", "from-hf", reference, str(tmp_path / "run")]) == status
    lines = [line for line in capfd.readouterr().err.splitlines() if "downloading" not in line]
    assert len(lines) == 1, lines
    assert any(part in lines[0] for part in reason.split("|")), lines
    assert not (tmp_path / "run").exists()


def test_token_is_sent_to_the_hub_only(hub, monkeypatch):
    hub.repos["models", NAME].access = "private"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    located(NAME)  # the CDN asserts that it receives no token
    assert all(request.token == TOKEN for request in hub.requests if "/resolve/" in request.path)


@pytest.mark.slow
def test_references_in_buckets(hub, published, tmp_path, monkeypatch):
    """From the hub to a run in a bucket, and to Hugging Face format in a bucket, which is read by ranges."""
    theirs = load_params(open_checkpoint(NAME), "float32")
    with proxied_bucket(tmp_path / "buckets", monkeypatch) as proxy:
        from_hf(NAME, "gs://bucket/run", {"fps": 1.0})
        with pytest.raises(InputError, match="already exists"):
            from_hf(NAME, "gs://bucket/run")
        run = open_run("gs://bucket/run")
        assert json.loads((run.config_folder / "reading.json").read_text()) == {"fps": 1.0}
        to_hf("gs://bucket/run", "gs://bucket/hf", shard_bytes=200_000)
        assert not storage.exists("gs://bucket/hf/.being-converted")
        proxy.requests.clear()
        checkpoint = open_checkpoint("gs://bucket/hf")
        for path, value in flatten(load_params(checkpoint, "float32")):
            np.testing.assert_array_equal(value, dict(flatten(theirs))[path])
        assert identity(checkpoint) == identity(open_checkpoint("gs://bucket/hf"))
        assert open_language_model("gs://bucket/hf").entries.keys() < checkpoint.entries.keys()
        assert tokenizer_folder("gs://bucket/hf").joinpath("tokenizer.json").is_file()
        # For part of a parameter, only some rows of the table are requested.
        entry = checkpoint.entries["model.embed_tokens.weight"]
        calls = []
        monkeypatch.setattr(storage, "read_into", count_calls(storage.read_into, calls))
        for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight", "audio_tower.conv1.weight",
                     "visual.patch_embed.proj.weight"):  # fmt: skip
            entry = checkpoint.entries[name]
            full = checkpoint.read(entry)
            where = tuple(slice(size // 4, size // 2) for size in full.shape)
            calls.clear()
            np.testing.assert_array_equal(checkpoint.read_part(entry, where), full[where])
            assert sum(calls) < full.nbytes


def count_calls(call, calls):
    def counting(path, first, buffer):
        calls.append(len(buffer))
        return call(path, first, buffer)

    return counting


def flatten(tree):
    from flax.traverse_util import flatten_dict

    return [(path, np.asarray(value)) for path, value in flatten_dict(tree).items()]


@pytest.mark.slow
def test_interrupted_conversion_to_a_bucket_leaves_no_run(published, tmp_path, monkeypatch):
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors"):
        assert (published / name).is_file()
    clean = tmp_path / "hf"
    shutil.copytree(published, clean)
    for name in ("modeling.py", "pytorch_model.bin", "consolidated.safetensors"):
        (clean / name).unlink()
    with proxied_bucket(tmp_path / "buckets", monkeypatch):
        real, left = references.storage.write, [2]

        def failing(path, data):
            left[0] -= 1
            if not left[0]:
                raise storage.StorageError("gone")
            real(path, data)

        monkeypatch.setattr(storage, "write", failing)
        with pytest.raises(storage.StorageError):
            from_hf(clean, "gs://bucket/run")
        monkeypatch.setattr(storage, "write", real)
        with pytest.raises(InputError, match="no finished step"):
            open_run("gs://bucket/run")
        from_hf(clean, "gs://bucket/run")
        assert open_run("gs://bucket/run").step == 0
        storage.write("gs://bucket/precious/file", b"x")
        with pytest.raises(InputError, match="already exists"):
            from_hf(clean, "gs://bucket/precious")


def test_push_can_be_repeated(hub, published, tmp_path, monkeypatch, capfd):
    from_hf(NAME, tmp_path / "run")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    push = ["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "hf"), "--push", "ORG/mine"]
    assert main(push) == 0
    repo = hub.repos["models", "ORG/mine"]
    first = repo.refs["main"]
    files = repo.commits[first]
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= files.keys()
    assert not [name for name in files if name.startswith(".made")]
    hub.requests.clear()
    assert main(push) == 0  # nothing has changed
    assert repo.refs["main"] == first
    assert not [request for request in hub.requests if request.method == "PUT"]
    forget()
    assert open_checkpoint("ORG/mine").tensors.keys() == open_checkpoint(NAME).tensors.keys()
    monkeypatch.setenv("HF_TOKEN", "")
    capfd.readouterr()
    assert main(push) == 2
    assert len(capfd.readouterr().err.splitlines()) == 1
    assert main([*push[:-2], "--dtype", "bfloat16", *push[-2:]]) == 2  # another conversion has the name

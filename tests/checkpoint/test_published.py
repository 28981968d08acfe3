"""The published checkpoint format: loading, conversion, and export that both classes of transformers load."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
import torchvision_ops  # noqa: F401 (must come before transformers' models)
from gcs import Proxy, Rounds, proxied_bucket
from hub import hub_server
from jax.sharding import Mesh
from published import PUBLISHED, write_published
from safetensors import safe_open
from train_runs import GRPO, Runs
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.convert import from_hf, to_hf
from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.checkpoint.load import load_params, load_sharded, open_checkpoint
from avocado_jax.config import DataConfig, SftConfig
from avocado_jax.data import storage
from avocado_jax.data.ordered import map_ordered
from avocado_jax.data.prompt import Habits, special_id
from avocado_jax.data.words import load_words
from avocado_jax.models.thinker import init
from avocado_jax.parallel.rules import shardings
from avocado_jax.train.run import open_folder, set_up

NAME = "AVoCaDO-Captioner/AVoCaDO"
SHALLOW = replace(  # for fast compilation
    PUBLISHED,
    audio=replace(PUBLISHED.audio, layers=1),
    vision=replace(PUBLISHED.vision, layers=2, full_layers=(1,)),
    text=replace(PUBLISHED.text, layers=1),
)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    return write_published(tmp_path_factory.mktemp("published") / "AVoCaDO")


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return out


def loaded(cls, folder: Path):
    """The model, without a missing, unexpected or misshapen tensor."""
    load = PreTrainedModel.from_pretrained.__func__ if cls is Qwen2_5OmniForConditionalGeneration else None
    arguments = dict(dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    model, report = load(cls, folder, **arguments) if load else cls.from_pretrained(folder, **arguments)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    return model


@pytest.mark.slow
def test_published_checkpoint_round_trip_from_the_hub(published, tmp_path, monkeypatch):
    """Tensors and side files are bit-identical, and the thinker and full-model classes of transformers load them."""
    names = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(names) == 1346
    assert all(name.startswith("thinker.") for name in names)
    assert len(set(names.values())) == 4
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add(NAME, published)
        commit = hub.repos["models", NAME].refs["main"]
        checkpoint = open_checkpoint(f"{NAME}@{commit}")
        assert not checkpoint.config.text.tied
        assert stop_ids(checkpoint.config_folder, load_words(checkpoint.config_folder), 512) == (258, 256)
        arguments = ["--reading", "fps=1.0", "--reading", "system=", "--reading", "media_first=false"]
        assert main(["convert", "from-hf", NAME, str(tmp_path / "run"), *arguments]) == 0
        assert not {"README.md", ".gitattributes"} & {*hub.fetched()}
    assert json.loads((tmp_path / "run/source.json").read_text()) == {"prefix": "thinker.", "hub": f"{NAME}@{commit}"}
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    ours, theirs = tensors_of(tmp_path / "back"), tensors_of(published)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for path in published.iterdir():
        if path.suffix in (".json", ".pt", ".txt") and "index" not in path.name:
            assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes()
    assert json.loads((tmp_path / "back/reading.json").read_text()) == {
        "fps": 1.0,
        "system": "",
        "media_first": False,
    }
    whole = loaded(Qwen2_5OmniForConditionalGeneration, tmp_path / "back")
    thinker = loaded(Qwen2_5OmniThinkerForConditionalGeneration, tmp_path / "back")
    assert not whole.has_talker
    for name, value in thinker.state_dict().items():
        assert torch.equal(value, whole.thinker.state_dict()[name]), name


def test_training_keeps_the_prompt_settings_of_its_checkpoint(tmp_path):
    """`reading.json` of a run has the clip sampling of its data and the prompt settings of its checkpoint."""
    folder = write_published(tmp_path / "hf", SHALLOW)
    stated = {"fps": 1.0, "media_first": False, "prompt": "Why?", "segment_seconds": 20}
    (folder / "reading.json").write_text(json.dumps(stated))
    data = DataConfig(train="world:0:train:0:8:plain", shapes=1)
    config = SftConfig(init=str(folder), batch=8, data=data)
    setup = set_up(config)
    assert setup.recipe.habits == Habits("Why?", media_first=False)
    assert setup.recipe.prompts == ("Why?",)
    open_folder(config, setup.model, str(tmp_path / "run"), setup.recipe.reading)
    kept = json.loads((tmp_path / "run/hf/reading.json").read_text())
    assert (kept["fps"], kept["media_first"], kept["prompt"]) == (setup.recipe.reading.fps, False, "Why?")
    assert kept["segment_seconds"] == 20


@pytest.fixture(scope="module")
def exported(published, tmp_path_factory) -> Path:
    """A run folder that was converted from the checkpoint."""
    from_hf(published, folder := tmp_path_factory.mktemp("run") / "run")
    return folder


def uploaded(folder: Path, name: str) -> str:
    """Copy a folder to the bucket."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    for _ in map_ordered(
        lambda path: storage.write(f"gs://bucket/{name}/{path.relative_to(folder)}", path.read_bytes()), files
    ):
        pass
    return f"gs://bucket/{name}"


def read_in_rounds(proxy: Proxy, read: Callable[[], Any], more: int = 1) -> Any:
    """Run `read` and check its round trips: the minimum with `REQUESTS` requests in flight, plus `more`."""
    proxy.ranges, proxy.peak, proxy.rounds = [0, 0], 0, Rounds(storage.REQUESTS)
    value = read()
    assert proxy.peak == storage.REQUESTS
    assert proxy.rounds.count <= proxy.ranges[0] // storage.REQUESTS + more
    proxy.rounds = None
    return value


def test_reads_from_a_bucket_use_the_full_bandwidth(tmp_path, monkeypatch):
    """One request per tensor, 32 at a time, for every way of loading."""
    published = write_published(tmp_path / "hf", SHALLOW)
    names = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    local = open_checkpoint(published)
    with proxied_bucket(tmp_path / "buckets", monkeypatch) as proxy:
        checkpoint = open_checkpoint(uploaded(published, "hf"))
        assert proxy.ranges[0] <= 3 * 4  # headers of four shards
        params = read_in_rounds(proxy, lambda: load_params(checkpoint, "float32"))
        assert proxy.ranges == [len(names) - 1, sum(2 * math.prod(tensor.shape) for tensor in local.tensors.values())]
        jax.tree.map(np.testing.assert_array_equal, params, load_params(local, "float32"))
        del params
        tree = jax.eval_shape(partial(init, checkpoint.config), jax.random.key(0))
        mesh = Mesh(np.array(jax.devices()[:4]).reshape(1, 2, 2), ("data", "fsdp", "tensor"))
        wanted = jax.tree.map(
            lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
            tree,
            shardings(tree, mesh),
        )
        params = read_in_rounds(proxy, lambda: load_sharded(checkpoint, wanted))
        assert proxy.ranges[0] == len(names) - 1
        jax.tree.map(np.testing.assert_array_equal, params, load_sharded(local, wanted))


@pytest.mark.slow
def test_export_from_a_bucket_uses_the_full_bandwidth(published, exported, tmp_path, monkeypatch):
    """One request per layer and some for the index, 32 at a time."""
    with proxied_bucket(tmp_path / "buckets", monkeypatch) as proxy:
        folder = uploaded(exported, "run")
        storage.write(f"{folder}/checkpoints/0/commit_success.txt", b"")
        proxy.requests.clear()
        read_in_rounds(proxy, lambda: to_hf(folder, tmp_path / "back"), more=10)  # the index has several levels
        assert proxy.ranges[0] < 700  # small tensors are in the index
    ours, theirs = tensors_of(tmp_path / "back"), tensors_of(published)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_round_trip_from_the_hub_to_a_bucket(published, tmp_path, monkeypatch):
    """All 1,346 tensors, and the other files that a checkpoint needs."""
    with hub_server(tmp_path / "home", monkeypatch) as hub, proxied_bucket(tmp_path / "buckets", monkeypatch):
        hub.add(NAME, published)
        assert main(["convert", "from-hf", NAME, "gs://bucket/base"]) == 0
        needed = {path.name for path in published.iterdir()} - {"README.md", ".gitattributes"}
        assert {*hub.fetched()} == needed
        assert main(["convert", "to-hf", "gs://bucket/base", str(tmp_path / "back")]) == 0
    ours, theirs = tensors_of(tmp_path / "back"), tensors_of(published)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_hub_checkpoint_is_trained_and_loaded_by_transformers(tmp_path, monkeypatch):
    """`sft --init ORG/NAME`, a GRPO step from it, `to-hf`, and the thinker class loads the result."""
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add(NAME, write_published(tmp_path / "hf", SHALLOW))
        fields = ("--steps", "1", "--data.heldout", "", "--train", "captioner")
        sft = Runs(tmp_path, NAME)
        sft.finish("sft", *fields, devices=2)
        Runs(tmp_path, tmp_path / "sft", "grpo", GRPO).finish("grpo", *fields, devices=2)
    assert main(["convert", "to-hf", str(tmp_path / "grpo"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    thinker = loaded(Qwen2_5OmniThinkerForConditionalGeneration, tmp_path / "back").state_dict()
    before = loaded(Qwen2_5OmniThinkerForConditionalGeneration, tmp_path / "hf").state_dict()
    moved = [name for name in before if not torch.equal(before[name], thinker[name])]
    assert any("layers.0.mlp.up_proj" in name for name in moved)
    assert not any("visual.blocks" in name for name in moved)


@pytest.mark.soak
def test_caption_with_every_tensor_of_the_checkpoint(published, tmp_path, monkeypatch, capsys):
    """`caption` by the public name at a revision, with all 1,346 tensors."""
    assert main(["world", str(tmp_path / "world"), "--clips", "1", "--seed", "0", "--level", "0"]) == 0
    clip = next((tmp_path / "world").rglob("*.mp4"))
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        commit = hub.add(NAME, published).refs["main"]
        capsys.readouterr()
        command = ["caption", str(clip), "--checkpoint", f"{NAME}@{commit}", "--max-new-tokens", "2", "--json"]
        assert main(command) == 0
        assert json.loads(capsys.readouterr().out)["token_ids"]


@pytest.mark.soak
def test_training_with_every_tensor_of_the_checkpoint(published, tmp_path, monkeypatch):
    """`sft` from the public name, a GRPO step, `to-hf`, with all 1,346 tensors: both classes load the result."""
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add(NAME, published)
        fields = ("--steps", "1", "--data.heldout", "", "--train", "captioner")
        Runs(tmp_path, NAME).finish("sft", *fields, devices=2)
        Runs(tmp_path, tmp_path / "sft", "grpo", GRPO).finish("grpo", *fields, devices=2)
    assert main(["convert", "to-hf", str(tmp_path / "grpo"), str(tmp_path / "back"), "--dtype", "bfloat16"]) == 0
    assert tensors_of(tmp_path / "back").keys() == tensors_of(published).keys()
    assert (tmp_path / "back" / "spk_dict.pt").read_bytes() == (published / "spk_dict.pt").read_bytes()
    whole = loaded(Qwen2_5OmniForConditionalGeneration, tmp_path / "back").thinker.state_dict()
    thinker = loaded(Qwen2_5OmniThinkerForConditionalGeneration, tmp_path / "back").state_dict()
    assert all(torch.equal(value, whole[name]) for name, value in thinker.items())
    before = loaded(Qwen2_5OmniThinkerForConditionalGeneration, published).state_dict()
    moved = [name for name in before if not torch.equal(before[name], thinker[name])]
    assert any("layers.0.mlp.up_proj" in name for name in moved)
    assert not any("visual.blocks" in name for name in moved)


def test_caption_command_loads_the_published_checkpoint(tmp_path, monkeypatch, capsys):
    """`caption` with a pinned public name and prompts from a file; few layers, to compile fast."""
    assert main(["world", str(tmp_path / "world"), "--clips", "1", "--seed", "0", "--level", "0"]) == 0
    clip = next((tmp_path / "world").rglob("*.mp4"))
    (tmp_path / "prompts.txt").write_text("Why?\n")
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        repo = hub.add(NAME, write_published(tmp_path / "hf", SHALLOW))
        (tmp_path / "hf" / "reading.json").write_text('{"media_first": false, "system": ""}')
        hub.add("ORG/sibling", tmp_path / "hf")
        ids = {}
        for name in (f"{NAME}@{repo.refs['main']}", "ORG/sibling"):
            capsys.readouterr()
            command = ["caption", str(clip), "--checkpoint", name, "--max-new-tokens", "2", "--json"]
            assert main([*command, "--prompt-file", str(tmp_path / "prompts.txt")]) == 0
            assert "spk_dict.pt" not in hub.fetched()  # only conversion and training copy this file
            ids[name[:3]] = json.loads(capsys.readouterr().out)["prompt_ids"]
    words = load_words(tmp_path / "hf")
    start, end = (special_id(words, token) for token in ("<|im_start|>", "<|im_end|>"))
    question, line, user, assistant = (
        words.encode(text, add_special_tokens=False) for text in ("Why?", "\n", "user\n", "assistant\n")
    )
    last, first = [*question, end, *line, start, *assistant], [start, *user, *question]
    assert ids["AVo"][-len(last) :] == last
    assert ids["ORG"][: len(first)] == first

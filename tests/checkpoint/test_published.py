"""The released checkpoint as it is: read, converted, and given back so that both classes of transformers load it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision_ops  # noqa: F401 (must come before transformers' models)
from gcs import proxied_bucket
from hub import hub_server
from published import PUBLISHED, write_published
from safetensors import safe_open
from train_runs import GRPO, Runs
from transformers import (
    PreTrainedModel,
    Qwen2_5OmniForConditionalGeneration,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from avocado_jax.__main__ import main
from avocado_jax.checkpoint.hf_config import stop_ids
from avocado_jax.checkpoint.load import open_checkpoint
from avocado_jax.config import DataConfig, SftConfig
from avocado_jax.data.prompt import Habits, special_id
from avocado_jax.data.words import load_words
from avocado_jax.train.run import open_folder, set_up

NAME = "AVoCaDO-Captioner/AVoCaDO"
SHALLOW = replace(  # compiles faster
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
def test_published_form_from_the_hub_and_back(published, tmp_path, monkeypatch):
    """Every tensor and side file comes back to the bit, and transformers' thinker and whole-model class load it."""
    names = json.loads((published / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(names) == 1346
    assert all(name.startswith("thinker.") for name in names)
    assert len(set(names.values())) == 4
    with hub_server(tmp_path / "home", monkeypatch) as hub:
        hub.add(NAME, published)
        commit = hub.repos["models", NAME].refs["main"]
        checkpoint = open_checkpoint(f"{NAME}@{commit}")
        assert not checkpoint.config.text.tied
        assert stop_ids(checkpoint.side_files, load_words(checkpoint.side_files), 512) == (258, 256)
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


def test_training_keeps_the_habits_of_its_checkpoint(tmp_path):
    """A run samples clips as its data does, and prompts as its checkpoint; both are in the run's `reading.json`."""
    folder = write_published(tmp_path / "hf", SHALLOW)
    (folder / "reading.json").write_text('{"fps": 1.0, "media_first": false, "prompt": "Why?"}')
    data = DataConfig(train="world:0:train:0:8:plain", shapes=1)
    config = SftConfig(init=str(folder), batch=8, data=data)
    setup = set_up(config)
    assert setup.recipe.habits == Habits("Why?", media_first=False)
    assert setup.recipe.prompts == ("Why?",)
    open_folder(config, setup.model, str(tmp_path / "run"), setup.recipe.reading)
    kept = json.loads((tmp_path / "run/hf/reading.json").read_text())
    assert (kept["fps"], kept["media_first"], kept["prompt"]) == (setup.recipe.reading.fps, False, "Why?")


@pytest.mark.slow
def test_from_the_hub_to_a_bucket(published, tmp_path, monkeypatch):
    """All 1,346 tensors; of the other files, those that a checkpoint needs."""
    with hub_server(tmp_path / "home", monkeypatch) as hub, proxied_bucket(tmp_path / "buckets", monkeypatch):
        hub.add(NAME, published)
        assert main(["convert", "from-hf", NAME, "gs://bucket/base"]) == 0
        needed = {path.name for path in published.iterdir()} - {"README.md", ".gitattributes"}
        assert {*hub.fetched()} == needed


@pytest.mark.slow
def test_from_the_hub_through_training_to_transformers(tmp_path, monkeypatch):
    """`sft --init ORG/NAME`, a GRPO step from it, `to-hf`, and the thinker class loads what was trained."""
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


def test_caption_command_takes_the_published_form(tmp_path, monkeypatch, capsys):
    """`caption` by a public name, pinned, with prompts of a file; fewer layers compile faster."""
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
            ids[name[:3]] = json.loads(capsys.readouterr().out)["prompt_ids"]
    words = load_words(tmp_path / "hf")
    start, end = (special_id(words, token) for token in ("<|im_start|>", "<|im_end|>"))
    question, line, user, assistant = (
        words.encode(text, add_special_tokens=False) for text in ("Why?", "\n", "user\n", "assistant\n")
    )
    last, first = [*question, end, *line, start, *assistant], [start, *user, *question]
    assert ids["AVo"][-len(last) :] == last
    assert ids["ORG"][: len(first)] == first

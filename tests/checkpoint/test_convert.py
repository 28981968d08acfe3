"""Hugging Face -> run -> Hugging Face: bit-identical, loaded by transformers, and strict about what it reads."""

import json
import shutil
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from reference import load_reference, randomise, write_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from avocado_jax.__main__ import main
from avocado_jax.checkpoint import convert
from avocado_jax.checkpoint.hf import open_hf
from avocado_jax.checkpoint.hf_config import config_json, read_config
from avocado_jax.checkpoint.load import open_checkpoint
from avocado_jax.checkpoint.orbax import open_run
from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.errors import InputError
from avocado_jax.models.config import SIZES, TINY


def all_tensors(folder):
    """Every tensor of a folder by name."""
    out = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            out |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    return out


def same(ours, theirs):
    """Equal names, dtypes, shapes and bits."""
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype, name
        assert torch.equal(ours[name].view(torch.uint8), tensor.view(torch.uint8)), name


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    """A thinker alone, fp32, in one file."""
    folder = tmp_path_factory.mktemp("thinker") / "hf"
    write_reference(folder, TINY)
    return folder


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """A full Omni checkpoint, bf16, in several shards with an index, with speakers and a tokenizer."""
    folder = tmp_path_factory.mktemp("omni") / "hf"
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen2_5OmniConfig(
        thinker_config=config_json(TINY),
        talker_config={**small, "num_key_value_heads": 1, "head_dim": 16, "embedding_size": 64, "vocab_size": 100},
        token2wav_config={
            "dit_config": {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "ff_mult": 1},
            "bigvgan_config": {"upsample_initial_channel": 64},
        },
    )
    model = Qwen2_5OmniForConditionalGeneration(config).to(torch.bfloat16)
    randomise(model)
    model.save_pretrained(folder, max_shard_size="300KB")
    torch.save({"Ethan": torch.ones(3)}, folder / "spk_dict.pt")
    write_tokenizer(folder)
    return folder


def test_thinker_round_trip(thinker, tmp_path):
    assert main(["convert", "from-hf", str(thinker), str(tmp_path / "run")]) == 0
    assert main(["convert", "to-hf", str(tmp_path / "run"), str(tmp_path / "back")]) == 0
    same(all_tensors(tmp_path / "back"), all_tensors(thinker))
    load_reference(tmp_path / "back")


def test_omni_round_trip(omni, tmp_path):
    assert len(list(omni.glob("*.safetensors"))) > 2
    assert open_checkpoint(omni).source.prefix == "thinker."
    convert.from_hf(omni, tmp_path / "run")
    assert convert.to_hf(tmp_path / "run", tmp_path / "back", shard_bytes=400_000) == 0
    theirs = all_tensors(omni)
    assert any(name.startswith("token2wav.") for name in theirs)
    same(all_tensors(tmp_path / "back"), theirs)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    for name in ("spk_dict.pt", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (omni / name).read_bytes()
    load = PreTrainedModel.from_pretrained.__func__  # Omni's own cannot report what it found
    _, report = load(Qwen2_5OmniForConditionalGeneration, tmp_path / "back", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_tied_output(thinker, tmp_path):
    """A checkpoint without an output matrix is a tied one, and stays so."""
    shutil.copytree(thinker, tmp_path / "tied")
    tensors = load_file(tmp_path / "tied" / "model.safetensors")
    del tensors["lm_head.weight"]
    save_file(tensors, tmp_path / "tied" / "model.safetensors")
    convert.from_hf(tmp_path / "tied", tmp_path / "run")
    assert open_run(tmp_path / "run").config.text.tied
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    same(all_tensors(tmp_path / "back"), tensors)


def test_dtype_and_step(thinker, tmp_path):
    convert.from_hf(thinker, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "0", steps / "7")
    (steps / "9" / "params").mkdir(parents=True)  # begun, never finished
    assert convert.to_hf(tmp_path / "run", tmp_path / "bf16", dtype="bfloat16") == 7
    for name, tensor in all_tensors(tmp_path / "bf16").items():
        if "audio_bos_eos" not in name:
            assert torch.equal(tensor, all_tensors(thinker)[name].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    with pytest.raises(InputError, match="no finished step 9; there are 0, 7"):
        convert.to_hf(tmp_path / "run", tmp_path / "never", step=9)


@pytest.mark.parametrize("size", SIZES)
def test_config_spellings(size, thinker):
    """Ours, the published spelling, and transformers 5's (its own file) say the same."""
    assert read_config(config_json(SIZES[size]), tied=False) == SIZES[size]
    assert read_config({"model_type": "qwen2_5_omni", "thinker_config": config_json(SIZES[size])}, False) == SIZES[size]
    saved = json.loads((thinker / "config.json").read_text())
    assert "rope_parameters" in saved["text_config"]
    assert read_config(saved, tied=False) == TINY


def edited(thinker, folder, edit):
    """A copy of the checkpoint with its tensors edited."""
    shutil.copytree(thinker, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


NAME = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("edit", "reason"),
    [
        (lambda t: t.pop(NAME), f"'{NAME}' is missing"),
        (lambda t: t.update({NAME: t[NAME].T.contiguous()}), f"'{NAME}' has shape"),
        (lambda t: t.update({"model.layers.2.mlp.up_proj.weight": t[NAME].clone()}), "unknown tensor 'model.layers.2"),
        (lambda t: t.update({NAME: t[NAME].to(torch.int32)}), f"'{NAME}' is int32"),
    ],
)
def test_wrong_tensors_are_named(thinker, tmp_path, edit, reason, capsys):
    folder = edited(thinker, tmp_path / "hf", edit)
    assert main(["convert", "from-hf", str(folder), str(tmp_path / "run")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert reason in line
    assert not (tmp_path / "run").exists()


def test_mixed_dtypes_of_a_stack_are_refused(thinker, tmp_path):
    folder = edited(thinker, tmp_path / "hf", lambda t: t.update({NAME: t[NAME].to(torch.bfloat16)}))
    with pytest.raises(InputError, match=NAME):
        convert.from_hf(folder, tmp_path / "run")
    assert not list(tmp_path.glob("run*"))


def test_doubled_tensor_and_lying_index(omni, tmp_path):
    shutil.copytree(omni, tmp_path / "hf")
    index = tmp_path / "hf" / "model.safetensors.index.json"
    stated = json.loads(index.read_text())
    first, second = sorted(set(stated["weight_map"].values()))[:2]
    tensors = load_file(tmp_path / "hf" / second)
    doubled = next(name for name, file in stated["weight_map"].items() if file == first)
    tensors[doubled] = load_file(tmp_path / "hf" / first)[doubled]
    save_file(tensors, tmp_path / "hf" / second)
    with pytest.raises(InputError, match=doubled):
        open_hf(tmp_path / "hf")
    for name in ("../model.safetensors", "/etc/passwd", "spk_dict.pt"):
        index.write_text(json.dumps({"weight_map": dict.fromkeys(stated["weight_map"], name)}))
        with pytest.raises(InputError, match="not a safetensors file of this folder"):
            open_hf(tmp_path / "hf")


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("modeling_evil.py", "import os", "code"),
        ("pytorch_model.bin", "x", "pickles"),
        ("config.json", '{"auto_map": {"AutoModel": "x.y"}}', "remote code"),
        ("tokenizer_config.json", '{"auto_map": {}}', "remote code"),
        ("config.json", '{"model_type": "llama"}', "not a Qwen2.5-Omni"),
        ("config.json", "{", "not JSON"),
    ],
)
def test_code_and_strangers_are_refused(thinker, tmp_path, name, content, reason):
    shutil.copytree(thinker, tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(InputError, match=reason):
        open_hf(tmp_path / "hf")


def test_existing_target_and_full_disk(thinker, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    assert main(["convert", "from-hf", str(thinker), str(tmp_path / "there")]) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    assert main(["convert", "from-hf", str(thinker), str(tmp_path / "run")]) == 2
    assert "free" in capsys.readouterr().err


def test_each_layer_is_read_alone(thinker, tmp_path):
    """On disk no chunk holds two layers of a stack."""
    convert.from_hf(thinker, tmp_path / "run")
    run = open_run(tmp_path / "run")
    for entry in run.entries.values():
        if entry.layer is not None:
            assert run.open(entry).chunk_layout.read_chunk.shape[0] == 1
    hf = open_hf(thinker)
    for entry in hf.entries.values():
        np.testing.assert_array_equal(run.read(entry), hf.read(entry))


def test_hub_cache_snapshot(thinker, tmp_path):
    """A snapshot of the hub's cache is a folder of links to blobs elsewhere."""
    (tmp_path / "snapshot").mkdir()
    for path in thinker.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    convert.from_hf(tmp_path / "snapshot", tmp_path / "run")
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    same(all_tensors(tmp_path / "back"), all_tensors(thinker))
    assert not any(path.is_symlink() for path in tmp_path.glob("back/*"))


def test_killed_conversion(thinker, tmp_path):
    """Killed at once, a conversion leaves no target that looks finished, and the same command then finishes."""
    command = [sys.executable, "-m", "avocado_jax", "convert", "from-hf", str(thinker), str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while not (tmp_path / "run.partial").exists() and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    process.wait()
    if not (tmp_path / "run").exists():  # it was in the middle
        (tmp_path / "run.partial" / "stale").touch()
        assert subprocess.run(command, stdout=subprocess.DEVNULL, check=True).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    assert not (tmp_path / "run" / "stale").exists()
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    same(all_tensors(tmp_path / "back"), all_tensors(thinker))

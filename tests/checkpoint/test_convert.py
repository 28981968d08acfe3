"""Conversion between Hugging Face and run folders: bit-identical round trips, and refusal of invalid input."""

import json
import shutil
import subprocess
import sys

import numpy as np
import orbax.checkpoint as ocp
import pytest
import torch
from reference import load_reference, randomise, write_reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

from avocado_jax.__main__ import main
from avocado_jax.checkpoint import convert, orbax
from avocado_jax.checkpoint.hf import open_hf
from avocado_jax.checkpoint.hf_config import config_json, read_config
from avocado_jax.checkpoint.load import open_checkpoint
from avocado_jax.checkpoint.orbax import Pieces, open_run, save_pieces
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


def assert_bit_identical(ours, theirs):
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
    assert_bit_identical(all_tensors(tmp_path / "back"), all_tensors(thinker))
    load_reference(tmp_path / "back")


def test_omni_round_trip(omni, tmp_path):
    assert len(list(omni.glob("*.safetensors"))) > 2
    assert open_checkpoint(omni).prefix == "thinker."
    convert.from_hf(omni, tmp_path / "run")
    assert convert.to_hf(tmp_path / "run", tmp_path / "back", shard_bytes=400_000) == (0, None)
    theirs = all_tensors(omni)
    assert any(name.startswith("token2wav.") for name in theirs)
    assert_bit_identical(all_tensors(tmp_path / "back"), theirs)
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 2
    for name in ("spk_dict.pt", "config.json", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (omni / name).read_bytes()
    load = PreTrainedModel.from_pretrained.__func__  # the full-model class does not report missing tensors
    _, report = load(Qwen2_5OmniForConditionalGeneration, tmp_path / "back", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))


def test_tied_output_embedding(thinker, tmp_path):
    """With a tied config there is no output matrix, also after a round trip; otherwise it is reported as missing."""
    folder = edited(thinker, tmp_path / "tied", lambda tensors: tensors.pop("lm_head.weight"))
    with pytest.raises(InputError, match=r"'lm_head\.weight' is missing"):
        open_hf(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    convert.from_hf(folder, tmp_path / "run")
    assert open_run(tmp_path / "run").config.text.tied
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    assert_bit_identical(all_tensors(tmp_path / "back"), all_tensors(folder))
    load_reference(tmp_path / "back")


def test_to_hf_with_dtype_and_step(thinker, tmp_path):
    convert.from_hf(thinker, tmp_path / "run")
    steps = tmp_path / "run" / "checkpoints"
    shutil.copytree(steps / "0", steps / "7")
    (steps / "9" / "params").mkdir(parents=True)  # never finished
    assert convert.to_hf(tmp_path / "run", tmp_path / "bf16", dtype="bfloat16").step == 7
    for name, tensor in all_tensors(tmp_path / "bf16").items():
        if "audio_bos_eos" not in name:
            assert torch.equal(tensor, all_tensors(thinker)[name].to(torch.bfloat16)), name
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    convert.from_hf(tmp_path / "bf16", tmp_path / "again")  # a thinker alone in bf16, its unused tensor in fp32
    convert.to_hf(tmp_path / "again", tmp_path / "back")
    assert_bit_identical(all_tensors(tmp_path / "back"), all_tensors(tmp_path / "bf16"))
    with pytest.raises(InputError, match="no finished step 9; there are 0, 7"):
        convert.to_hf(tmp_path / "run", tmp_path / "never", step=9)


@pytest.mark.parametrize("size", SIZES)
def test_config_is_parsed_in_every_spelling(size, thinker):
    """Our spelling, the published one and that of transformers 5 (from its file) give equal configs."""
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


def test_duplicate_tensor_and_wrong_index_are_refused(omni, tmp_path):
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
        ("config.json", "[]", "not an object"),
    ],
)
def test_code_and_other_models_are_refused(thinker, tmp_path, name, content, reason):
    shutil.copytree(thinker, tmp_path / "hf")
    (tmp_path / "hf" / name).write_text(content)
    with pytest.raises(InputError, match=reason):
        open_hf(tmp_path / "hf")


def test_existing_target_and_full_disk_are_errors(thinker, tmp_path, monkeypatch, capsys):
    (tmp_path / "there").mkdir()
    assert main(["convert", "from-hf", str(thinker), str(tmp_path / "there")]) == 2
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(100, 90, 10))
    assert main(["convert", "from-hf", str(thinker), str(tmp_path / "run")]) == 2
    assert "free" in capsys.readouterr().err


def test_one_layer_is_in_memory_at_a_time(thinker, tmp_path):
    """Each chunk on disk has one layer of a stack."""
    convert.from_hf(thinker, tmp_path / "run")
    run = open_run(tmp_path / "run")
    for entry in run.entries.values():
        if entry.layer is not None:
            assert run.open(entry).chunk_layout.read_chunk.shape[0] == 1
    hf = open_hf(thinker)
    for entry in hf.entries.values():
        np.testing.assert_array_equal(run.read(entry), hf.read(entry))


def test_convert_from_a_hub_cache_snapshot(thinker, tmp_path):
    """A snapshot in the hub's cache is a folder of links to blobs."""
    (tmp_path / "snapshot").mkdir()
    for path in thinker.iterdir():
        (tmp_path / "snapshot" / path.name).symlink_to(path)
    convert.from_hf(tmp_path / "snapshot", tmp_path / "run")
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    assert_bit_identical(all_tensors(tmp_path / "back"), all_tensors(thinker))
    assert not any(path.is_symlink() for path in tmp_path.glob("back/*"))


KILLED = """
import os, signal, sys
from avocado_jax.checkpoint.safetensors import Tensor
read, left = Tensor.read, [int(sys.argv[1])]
def dying(self, *rows):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), getattr(signal, sys.argv[2]))
    return read(self, *rows)
Tensor.read = dying
from avocado_jax.__main__ import main
sys.exit(main(["convert", "from-hf", *sys.argv[3:]]))
"""


@pytest.mark.parametrize(("name", "status"), [("SIGKILL", -9), ("SIGTERM", 75)])
def test_stopped_conversion_leaves_no_target(thinker, tmp_path, name, status):
    """A stopped conversion leaves no target, and the same command then finishes it."""
    command = [sys.executable, "-c", KILLED, "40", name, str(thinker), str(tmp_path / "run")]
    assert subprocess.run(command, capture_output=True, check=False).returncode == status
    assert [path.name for path in tmp_path.iterdir()] == ["run.partial"]
    convert.from_hf(thinker, tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]
    convert.to_hf(tmp_path / "run", tmp_path / "back")
    assert_bit_identical(all_tensors(tmp_path / "back"), all_tensors(thinker))


def test_existing_folder_is_not_deleted(thinker, tmp_path):
    """A `.partial` folder is deleted only if one of our conversions left it."""
    (tmp_path / "run.partial").mkdir()
    (tmp_path / "run.partial" / "precious").touch()
    with pytest.raises(InputError, match="not made by this command"):
        convert.from_hf(thinker, tmp_path / "run")
    assert (tmp_path / "run.partial" / "precious").exists()


@pytest.mark.parametrize("way", ["from-hf", "to-hf"])
def test_disk_that_fills_up_leaves_no_target(thinker, tmp_path, way):
    """A failed write prints one line and exits with 1, and no partial output has the target's name."""
    convert.from_hf(thinker, tmp_path / "whole")
    source = thinker if way == "from-hf" else tmp_path / "whole"
    program = (
        "import resource, signal, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000));"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        f"from avocado_jax.__main__ import main; sys.exit(main(['convert', {way!r}, *sys.argv[1:]]))"
    )
    command = [sys.executable, "-c", program, str(source), str(tmp_path / "target")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["whole"]


def test_damaged_run_is_refused(thinker, tmp_path):
    with pytest.raises(InputError, match="nowhere: no such folder"):
        convert.to_hf(tmp_path / "nowhere", tmp_path / "back")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no finished step"):
        convert.to_hf(tmp_path / "empty", tmp_path / "back")
    convert.from_hf(thinker, tmp_path / "run")
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    largest = max((tmp_path / "run").rglob("d/*"), key=lambda path: path.stat().st_size)
    largest.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        convert.to_hf(tmp_path / "run", tmp_path / "back")
    for wrong in ("{}", "[]", '{"prefix": "../"}'):
        (tmp_path / "other" / "source.json").write_text(wrong)
        with pytest.raises(InputError, match=r"source\.json"):
            convert.to_hf(tmp_path / "other", tmp_path / "back")
    assert not (tmp_path / "back").exists()


def test_chunks_in_memory_are_bounded(tmp_path, monkeypatch):
    """The bound holds for any number of concurrent leaves, and Orbax can restore the result."""
    alive, most = [0], [0]
    monkeypatch.setattr(orbax, "WRITE_BYTES", 2 * 30 * 40 * 4)

    class Counted(np.ndarray):
        """An array that counts its living instances."""

        def __del__(self):
            if getattr(self, "counts", False):
                alive[0] -= 1

    def pieces(value):
        def make():
            for i in range(len(value)):
                piece = np.array(value[i]).view(Counted)
                piece.counts = True
                alive[0] += 1
                most[0] = max(most[0], alive[0])
                yield i, piece

        return Pieces(value.shape, value.dtype, make)

    rng = np.random.default_rng(0)
    tree = {"layers": {name: rng.standard_normal((12, 30, 40)).astype(np.float32) for name in "abcdefgh"}}
    save_pieces(tmp_path / "params", {"layers": {name: pieces(value) for name, value in tree["layers"].items()}})
    assert 2 <= most[0] <= 4  # two being written, one being made, and one that a thread has not released yet
    restored = ocp.PyTreeCheckpointer().restore(tmp_path / "params")
    for name, value in tree["layers"].items():
        np.testing.assert_array_equal(restored["layers"][name], value)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("vision_config", "patch_size", 0),
        ("text_config", "num_attention_heads", 0),
        ("text_config", "num_hidden_layers", -1),
        ("text_config", "rope_scaling", [1]),
        ("text_config", "rope_scaling", {"mrope_section": ["a", 1, 2]}),
        ("text_config", "layer_types", ["sliding_attention"]),
        ("vision_config", "fullatt_block_indexes", ["x"]),
        ("audio_config", "d_model", "wide"),
        ("audio_config", "d_model", None),
        ("vision_config", "out_hidden_size", 65),
    ],
)
def test_invalid_configs_are_named(section, field, value):
    config = config_json(TINY)
    config[section] = config[section] | {field: value}
    with pytest.raises(InputError, match=r"config\.json"):
        read_config(config, tied=False)

"""Qwen2.5-Omni checkpoints in Hugging Face format: a bijective table of names, read one tensor at a time."""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import jax
import numpy as np

from avocado_jax.checkpoint.hf_config import read_config, read_text_config, says_tied
from avocado_jax.checkpoint.references import INDEX, fetched, is_remote, run_path
from avocado_jax.checkpoint.safetensors import Tensor, read_header
from avocado_jax.data import storage
from avocado_jax.data.ordered import map_ordered
from avocado_jax.errors import InputError
from avocado_jax.models.config import ThinkerConfig
from avocado_jax.models.thinker import init


class Change(NamedTuple):
    """A layout change and its inverse, as numpy views if possible. "theirs" is the Hugging Face layout."""

    ours: Callable[[np.ndarray], np.ndarray]
    theirs: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]  # (values, their shape) -> their layout
    shape: Callable[[tuple[int, ...], ThinkerConfig], tuple[int, ...]]  # our shape -> their shape
    rows: int  # our axis that corresponds to their first axis


SAME = Change(lambda x: x, lambda x, _: x, lambda shape, _: shape, 0)
LINEAR = Change(lambda x: x.T, lambda x, _: x.T, lambda shape, _: shape[::-1], 1)  # [out, in] -> [in, out]
CONV1D = Change(  # [out, in, taps] -> [taps, in, out]
    lambda x: x.transpose(2, 1, 0), lambda x, _: x.transpose(2, 1, 0), lambda shape, _: shape[::-1], 2
)
CONV3D = Change(  # [out, channels, frames, rows, columns] -> [patch, out]: stride = kernel, a matrix product
    lambda x: x.reshape(x.shape[0], -1).T,
    lambda x, shape: x.T.reshape(shape),
    lambda shape, config: (
        shape[1],
        config.vision.channels,
        config.vision.temporal_patch,
        config.vision.patch,
        config.vision.patch,
    ),
    1,
)

WEIGHT, BIAS = ("kernel", "weight", LINEAR), ("bias", "bias", SAME)
SCALE = ("scale", "weight", SAME)

# (our module, their module, parameters); '*' is the layer index.
MODULES = (
    ("audio/conv1", "audio_tower.conv1", (("kernel", "weight", CONV1D), BIAS)),
    ("audio/conv2", "audio_tower.conv2", (("kernel", "weight", CONV1D), BIAS)),
    ("audio/layers/*/attention_norm", "audio_tower.layers.*.self_attn_layer_norm", (SCALE, BIAS)),
    ("audio/layers/*/q", "audio_tower.layers.*.self_attn.q_proj", (WEIGHT, BIAS)),
    ("audio/layers/*/k", "audio_tower.layers.*.self_attn.k_proj", (WEIGHT,)),
    ("audio/layers/*/v", "audio_tower.layers.*.self_attn.v_proj", (WEIGHT, BIAS)),
    ("audio/layers/*/out", "audio_tower.layers.*.self_attn.out_proj", (WEIGHT, BIAS)),
    ("audio/layers/*/mlp_norm", "audio_tower.layers.*.final_layer_norm", (SCALE, BIAS)),
    ("audio/layers/*/up", "audio_tower.layers.*.fc1", (WEIGHT, BIAS)),
    ("audio/layers/*/down", "audio_tower.layers.*.fc2", (WEIGHT, BIAS)),
    ("audio/norm", "audio_tower.ln_post", (SCALE, BIAS)),
    ("audio/proj", "audio_tower.proj", (WEIGHT, BIAS)),
    ("vision/patch", "visual.patch_embed.proj", (("kernel", "weight", CONV3D),)),
    ("vision/layers/*/attention_norm", "visual.blocks.*.norm1", (SCALE,)),
    ("vision/layers/*/q", "visual.blocks.*.attn.q", (WEIGHT, BIAS)),
    ("vision/layers/*/k", "visual.blocks.*.attn.k", (WEIGHT, BIAS)),
    ("vision/layers/*/v", "visual.blocks.*.attn.v", (WEIGHT, BIAS)),
    ("vision/layers/*/out", "visual.blocks.*.attn.proj", (WEIGHT, BIAS)),
    ("vision/layers/*/mlp_norm", "visual.blocks.*.norm2", (SCALE,)),
    ("vision/layers/*/mlp/gate", "visual.blocks.*.mlp.gate_proj", (WEIGHT, BIAS)),
    ("vision/layers/*/mlp/up", "visual.blocks.*.mlp.up_proj", (WEIGHT, BIAS)),
    ("vision/layers/*/mlp/down", "visual.blocks.*.mlp.down_proj", (WEIGHT, BIAS)),
    ("vision/merger/norm", "visual.merger.ln_q", (SCALE,)),
    ("vision/merger/up", "visual.merger.mlp.0", (WEIGHT, BIAS)),
    ("vision/merger/out", "visual.merger.mlp.2", (WEIGHT, BIAS)),
    ("", "model.embed_tokens", (("embedding", "weight", SAME),)),
    ("text/layers/*/attention_norm", "model.layers.*.input_layernorm", (SCALE,)),
    ("text/layers/*/q", "model.layers.*.self_attn.q_proj", (WEIGHT, BIAS)),
    ("text/layers/*/k", "model.layers.*.self_attn.k_proj", (WEIGHT, BIAS)),
    ("text/layers/*/v", "model.layers.*.self_attn.v_proj", (WEIGHT, BIAS)),
    ("text/layers/*/out", "model.layers.*.self_attn.o_proj", (WEIGHT,)),
    ("text/layers/*/mlp_norm", "model.layers.*.post_attention_layernorm", (SCALE,)),
    ("text/layers/*/mlp/gate", "model.layers.*.mlp.gate_proj", (WEIGHT,)),
    ("text/layers/*/mlp/up", "model.layers.*.mlp.up_proj", (WEIGHT,)),
    ("text/layers/*/mlp/down", "model.layers.*.mlp.down_proj", (WEIGHT,)),
    ("text/norm", "model.norm", (SCALE,)),
    ("", "lm_head", (("head", "weight", SAME),)),
)
UNUSED = "audio_tower.audio_bos_eos_token.weight"  # in every checkpoint, but unused
NOT_MODELLED = ("talker.", "token2wav.")  # the speech generation of Omni


class Entry(NamedTuple):
    """A tensor of the checkpoint and its location in the parameter tree."""

    name: str  # tensor name, without the "thinker." of full checkpoints
    path: tuple[str, ...]  # path in the tree of stacked layers
    layer: int | None  # index in the stack
    change: Change
    shape: tuple[int, ...]  # shape in the checkpoint


def table(config: ThinkerConfig) -> dict[str, Entry]:
    """Map names to all modelled tensors. The entries cover each parameter, and each layer of a stack, exactly once."""
    plain = replace(config, scan=True, text=replace(config.text, lora=None))
    tree = jax.eval_shape(lambda: init(plain, jax.random.key(0)))
    leaves = {
        tuple(str(key.key) for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
    }
    entries = {}
    for ours, theirs, parameters in MODULES:
        for parameter, their_parameter, change in parameters:
            path = (*(part for part in ours.split("/") if part not in ("", "*")), parameter)
            if path not in leaves:  # tied models have no output matrix
                continue
            shape = leaves.pop(path)
            layers = range(shape[0]) if "*" in ours else (None,)
            for layer in layers:
                name = f"{theirs}.{their_parameter}".replace("*", str(layer))
                layer_shape = shape if layer is None else shape[1:]
                entries[name] = Entry(name, path, layer, change, change.shape(layer_shape, config))
    assert not leaves, f"parameters without a name in Hugging Face format: {sorted(leaves)}"
    return entries


def without_towers(entries: Mapping[str, Entry]) -> dict[str, Entry]:
    """The entries of the language model."""
    return {name: entry for name, entry in entries.items() if entry.path[0] not in ("audio", "vision")}


class HfCheckpoint(NamedTuple):
    """An opened folder, local or gs://. Only headers and side files are read on opening."""

    folder: PurePath
    config: ThinkerConfig
    entries: dict[str, Entry]
    tensors: dict[str, Tensor]  # modelled tensors by entry name
    carried: dict[str, Tensor]  # unmodelled tensors by their full name
    prefix: str  # "thinker." in a full checkpoint
    config_folder: Path  # the local folder of config.json, the tokenizer and generation settings

    def read(self, entry: Entry) -> np.ndarray:
        """Read a parameter, or a layer of a stacked parameter, in our layout."""
        return entry.change.ours(self.tensors[entry.name].read())

    def read_part(self, entry: Entry, where: tuple[slice, ...]) -> np.ndarray:
        """Read a block of the result of `read`. Reads only its pages from local files, and its rows from a bucket."""
        tensor = self.tensors[entry.name]
        if not is_remote(tensor.file):
            return np.ascontiguousarray(entry.change.ours(tensor.mapped())[where])
        rows = entry.change.rows
        value = entry.change.ours(tensor.read(where[rows]))
        return np.ascontiguousarray(value[(*where[:rows], slice(None), *where[rows + 1 :])])


def is_hf(folder: str | os.PathLike) -> bool:
    """Whether `folder`, local or gs://, looks like a checkpoint in Hugging Face format."""
    names = storage.names(str(folder))
    return "config.json" in names and any(".safetensors" in name for name in names)


def read_json(path: PurePath) -> Any:
    """Read a JSON file.

    Raises:
        InputError: the file is missing, or not JSON.
    """
    if not storage.exists(str(path)):
        raise InputError(f"{path}: no such file")
    try:
        return json.loads(storage.read(str(path)))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON: {error}") from error


def open_hf(folder: str | os.PathLike, text_only: bool = False, copies: bool = False) -> HfCheckpoint:
    """Open a checkpoint of the thinker or of full Omni, with or without an index.

    Args:
        text_only: the checkpoint is a text model (Qwen2) without encoders.
        copies: also download side files that are only copied, from a bucket.

    Raises:
        InputError: a tensor is missing, unknown, duplicate or has the wrong shape; the config is invalid; or the folder
            has remote code, pickles, or paths outside the folder.
    """
    folder = run_path(folder) if storage.is_remote(str(folder)) else Path(folder)
    refuse_names(folder)
    config_folder = fetched(folder, weights=False, copies=copies)
    refuse_code(config_folder)
    found = read_tensors(folder)
    prefix = "thinker." if any(name.startswith("thinker.") for name in found) else ""
    fields = read_json(config_folder / "config.json")
    tied = f"{prefix}lm_head.weight" not in found and says_tied(fields)
    config = (read_text_config if text_only else read_config)(fields, tied)
    entries = table(config)
    if text_only:
        entries = without_towers(entries)
    tensors, carried = {}, {}
    for name, tensor in found.items():
        inner = name.removeprefix(prefix)
        if (prefix and name.startswith(NOT_MODELLED)) or inner == UNUSED:
            carried[name] = tensor
        elif not name.startswith(prefix) or inner not in entries:
            raise InputError(f"{tensor.file}: unknown tensor '{name}'")
        elif tensor.shape != entries[inner].shape:
            raise InputError(
                f"{tensor.file}: tensor '{name}' has shape {list(tensor.shape)}, "
                f"the config requires {list(entries[inner].shape)}"
            )
        elif tensor.dtype.kind != "f" and tensor.dtype.name != "bfloat16":
            raise InputError(f"{tensor.file}: tensor '{name}' is {tensor.dtype.name}, not floating point")
        else:
            tensors[inner] = tensor
    for name in entries:
        if name not in tensors:
            raise InputError(f"{folder}: tensor '{prefix}{name}' is missing")
    return HfCheckpoint(folder, config, entries, tensors, carried, prefix, config_folder)


def refuse_names(folder: PurePath) -> None:
    """Reject a folder, local or gs://, with Python modules or pickles (`spk_dict.pt` is only copied)."""
    for name in storage.names(str(folder)):
        path = folder / name
        if path.suffix == ".py":
            raise InputError(f"{path}: a checkpoint with code is not loaded")
        if path.suffix in (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt") and path.name != "spk_dict.pt":
            raise InputError(f"{path}: pickles are not loaded")


def refuse_code(folder: Path) -> None:
    """Reject a local folder with code, or with configs that refer to code."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder")
    refuse_names(folder)
    for path in sorted(folder.iterdir()):
        if path.suffix == ".json" and path.name.endswith("config.json"):
            fields = read_json(path)
            if isinstance(fields, dict) and "auto_map" in fields:
                raise InputError(f"{path}: a checkpoint with remote code ('auto_map') is not loaded")


def read_tensors(folder: PurePath) -> dict[str, Tensor]:
    """Map names to all tensors of the shards of a folder, local or gs://."""
    index, present = folder / INDEX, storage.names(str(folder))
    where: Mapping[str, str] | None = None
    if INDEX in present:
        fields = read_json(index)
        where = fields.get("weight_map") if isinstance(fields, dict) else None
        if not isinstance(where, dict) or not all(isinstance(name, str) for name in where.values()):
            raise InputError(f"{index}: no 'weight_map' from tensors to files")
        files = sorted(set(where.values()))
        for name in files:
            if name != Path(name).name or not name.endswith(".safetensors"):
                raise InputError(f"{index}: '{name}' is not a safetensors file of this folder")
    else:
        files = [name for name in present if name.endswith(".safetensors")]
    if not files:
        raise InputError(f"{folder}: no *.safetensors files")
    for name in files:
        if name not in present:
            raise InputError(f"{folder / name}: missing, though the index names it")
    tensors: dict[str, Tensor] = {}
    for header, name in zip(map_ordered(lambda name: read_header(folder / name), files), files):
        for tensor, entry in header.items():
            if tensor in tensors:
                raise InputError(f"{folder / name}: tensor '{tensor}' is in {tensors[tensor].file.name} too")
            if where is not None and where.get(tensor) != name:
                raise InputError(f"{folder / name}: the index lists tensor '{tensor}' in another file or not at all")
            tensors[tensor] = entry
    for tensor in where or {}:
        if tensor not in tensors:
            raise InputError(f"{folder / where[tensor]}: tensor '{tensor}' of the index is missing")
    return tensors


def copied_files(folder: Path) -> Iterator[Path]:
    """Yield the files other than weights (configs, tokenizer, speakers), which conversions copy unchanged."""
    for path in sorted(folder.iterdir()):
        if path.is_file() and ".safetensors" not in path.name and not path.name.startswith("."):
            yield path

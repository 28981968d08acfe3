"""Load sentence encoders in Hugging Face format: BERT with mean or first-token pooling, from safetensors."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.checkpoint.hf import LINEAR, SAME, read_json, read_tensors
from avocado_jax.errors import InputError
from avocado_jax.models.encoder import Encoder, EncoderConfig

LINEARS = {
    "q": "attention.self.query",
    "k": "attention.self.key",
    "v": "attention.self.value",
    "out": "attention.output.dense",
    "up": "intermediate.dense",
    "down": "output.dense",
}
NORMS = {"attention_norm": "attention.output.LayerNorm", "mlp_norm": "output.LayerNorm"}
TABLES = {"words": "word_embeddings", "places": "position_embeddings", "kinds": "token_type_embeddings"}
UNUSED = ("pooler.", "embeddings.position_ids", "cls.")  # heads of BERT's pretraining, and a constant


def read_encoder(folder: Path) -> tuple[EncoderConfig, dict[str, Any]]:
    """Read the config and the fp32 parameters of `Encoder` from a sentence-transformers or transformers folder.

    Raises:
        InputError: the folder has no encoder, or an unsupported one; or a tensor is missing, unknown or has the wrong
            shape.
    """
    config = _config(folder)
    shapes = jax.eval_shape(
        partial(Encoder(config).init, jax.random.key(0)), jnp.zeros((1, 1), int), jnp.ones((1, 1), bool)
    )
    wanted = {_name(path): (path, leaf.shape) for path, leaf in flatten_dict(shapes["params"]).items()}
    params = {}
    for full, tensor in read_tensors(folder).items():
        name = full.removeprefix("bert.")
        if name.startswith(UNUSED):
            continue
        if name not in wanted:
            raise InputError(f"{tensor.file}: unknown tensor '{full}'")
        path, shape = wanted.pop(name)
        value = (LINEAR if path[-1] == "kernel" else SAME).ours(tensor.read())
        if value.shape != shape:
            raise InputError(f"{tensor.file}: tensor '{full}' does not fit the shape {list(shape)} of config.json")
        params[path] = jnp.asarray(np.asarray(value, np.float32))
    if wanted:
        raise InputError(f"{folder}: tensor '{next(iter(wanted))}' is missing")
    return config, unflatten_dict(params)


def _name(path: tuple[str, ...]) -> str:
    """The checkpoint's name of a parameter path."""
    if len(path) == 1:
        return f"embeddings.{TABLES[path[0]]}.weight"
    *module, parameter = path
    parameter = "bias" if parameter == "bias" else "weight"
    if module == ["norm"]:
        return f"embeddings.LayerNorm.{parameter}"
    layer, part = module
    return f"encoder.layer.{layer.removeprefix('layers_')}.{(LINEARS | NORMS)[part]}.{parameter}"


def _config(folder: Path) -> EncoderConfig:
    fields = read_json(folder / "config.json")
    if not isinstance(fields, dict) or fields.get("model_type") != "bert":
        raise InputError(f"{folder / 'config.json'}: not a BERT")
    for name, known in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if fields.get(name, known) != known:
            raise InputError(f"{folder / 'config.json'}: {name} is {fields[name]!r}, not {known!r}")
    try:
        config = EncoderConfig(
            vocab=int(fields["vocab_size"]),
            width=int(fields["hidden_size"]),
            ffn=int(fields["intermediate_size"]),
            layers=int(fields["num_hidden_layers"]),
            heads=int(fields["num_attention_heads"]),
            positions=int(fields["max_position_embeddings"]),
            kinds=int(fields["type_vocab_size"]),
            eps=float(fields["layer_norm_eps"]),
        )
        if min(config.vocab, config.width, config.heads) < 1 or config.width % config.heads:
            raise ValueError(f"width {config.width} is not divided by {config.heads} heads")
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{folder / 'config.json'}: {error}") from error
    return replace(config, pool=_pooling(folder))


def _pooling(folder: Path) -> str:
    """The pooling of sentence-transformers; "mean" without its config files."""
    modules, pooling = folder / "modules.json", folder / "1_Pooling" / "config.json"
    layers = read_json(modules) if modules.is_file() else []
    modes = read_json(pooling) if pooling.is_file() else {"pooling_mode_mean_tokens": True}
    try:
        kinds = [layer["type"].rpartition(".")[-1] for layer in layers]
    except (TypeError, KeyError, AttributeError):
        raise InputError(f"{modules}: not a list of layers") from None
    if others := set(kinds) - {"Transformer", "Pooling", "Normalize"}:
        raise InputError(f"{modules}: a layer of kind {min(others)} is not implemented")
    if not isinstance(modes, dict):
        raise InputError(f"{pooling}: not an object")
    chosen = [name for name, on in modes.items() if name.startswith("pooling_mode_") and on is True]
    pools = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "first"}
    if len(chosen) != 1 or chosen[0] not in pools:
        raise InputError(f"{pooling}: pooling by {', '.join(chosen) or 'nothing'} is not implemented")
    return pools[chosen[0]]

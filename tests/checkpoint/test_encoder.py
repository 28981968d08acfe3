"""Sentence encoders equal transformers' BERT; other models are refused."""

import json

import jax
import numpy as np
import pytest
import torch
import torchvision_ops  # noqa: F401 (must come before transformers' models)
from reference import randomise
from transformers import BertConfig, BertModel

from avocado_jax.checkpoint.hf_encoder import read_encoder
from avocado_jax.errors import InputError
from avocado_jax.models.encoder import Encoder

SIZES = dict(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, vocab_size=60)
MEAN, FIRST = (
    {f"pooling_mode_{name}": on for on, name in zip(flags, ("mean_tokens", "cls_token"))}
    for flags in ((True, False), (False, True))
)


def write_bert(folder, pooling=None, **fields):
    """A random BERT as sentence-transformers lays it out."""
    model = BertModel(BertConfig(**SIZES, max_position_embeddings=32, **fields)).eval()
    randomise(model)
    model.save_pretrained(folder)
    if pooling is not None:
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps({"word_embedding_dimension": 48, **pooling}))
        modules = [{"type": f"sentence_transformers.models.{kind}"} for kind in ("Transformer", "Pooling", "Normalize")]
        (folder / "modules.json").write_text(json.dumps(modules))
    return model


@pytest.mark.parametrize("pooling", [None, MEAN, FIRST])
def test_vectors_equal_the_reference(tmp_path, pooling):
    model = write_bert(tmp_path, pooling)
    config, params = read_encoder(tmp_path)
    assert (config.width, config.layers, config.heads, config.positions) == (48, 2, 4, 32)
    tokens = np.random.default_rng(0).integers(0, 60, (4, 11))
    valid = np.arange(11) < np.array([11, 4, 1, 0])[:, None]
    with torch.no_grad():
        states = model(input_ids=torch.tensor(tokens[:3]), attention_mask=torch.tensor(valid[:3]).long())[0].numpy()
    mean = np.stack([state[mask].mean(axis=0) for state, mask in zip(states, valid)])
    expected = states[:, 0] if pooling is FIRST else mean
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    vectors = jax.jit(Encoder(config).apply)({"params": params}, tokens, valid)
    np.testing.assert_allclose(vectors[:3], expected, atol=1e-5)
    np.testing.assert_array_equal(vectors[3], 0)


def test_encoder_is_loaded_from_a_model_with_heads(tmp_path):
    from safetensors.numpy import load_file, save_file

    write_bert(tmp_path)
    _, plain = read_encoder(tmp_path)
    file = tmp_path / "model.safetensors"
    named = {f"bert.{name}": value for name, value in load_file(file).items()}
    save_file(named | {"cls.predictions.bias": np.zeros(60, np.float32)}, file)
    _, found = read_encoder(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, found, plain)


def edit(path, change):
    """Change the object in a JSON file."""
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


BROKEN = {
    "of another kind": (
        lambda folder: edit(folder / "config.json", lambda it: it.update(model_type="roberta")),
        "BERT",
    ),
    "relative": (
        lambda folder: edit(folder / "config.json", lambda it: it.update(position_embedding_type="relative_key")),
        "position_embedding_type",
    ),
    "gelu_new": (
        lambda folder: edit(folder / "config.json", lambda it: it.update(hidden_act="gelu_new")),
        "hidden_act",
    ),
    "no sizes": (lambda folder: edit(folder / "config.json", lambda it: it.pop("vocab_size")), "vocab_size"),
    "no heads": (lambda folder: edit(folder / "config.json", lambda it: it.update(num_attention_heads=0)), "heads"),
    "fewer layers": (lambda folder: edit(folder / "config.json", lambda it: it.update(num_hidden_layers=1)), "unknown"),
    "more layers": (lambda folder: edit(folder / "config.json", lambda it: it.update(num_hidden_layers=3)), "missing"),
    "wider": (lambda folder: edit(folder / "config.json", lambda it: it.update(intermediate_size=97)), "shape"),
    "max": (
        lambda folder: edit(
            folder / "1_Pooling" / "config.json",
            lambda it: it.update(pooling_mode_max_tokens=True, pooling_mode_mean_tokens=False),
        ),
        "pooling_mode_max_tokens",
    ),
    "dense": (
        lambda folder: edit(
            folder / "modules.json", lambda it: it.append({"type": "sentence_transformers.models.Dense"})
        ),
        "Dense",
    ),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "safetensors"),
    "cut": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-9]),
        "safetensors",
    ),
    "modules of nothing": (lambda folder: (folder / "modules.json").write_text("[1]"), "modules.json"),
    "pooling of nothing": (lambda folder: (folder / "1_Pooling" / "config.json").write_text("[]"), "1_Pooling"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_other_models_are_refused(tmp_path, how):
    write_bert(tmp_path, MEAN)
    breaking, message = BROKEN[how]
    breaking(tmp_path)
    with pytest.raises(InputError, match=message):
        read_encoder(tmp_path)

"""Captions from a training state: equal for stacked and separate layers, on one device and over a mesh."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import multihost_utils
from jax.sharding import PartitionSpec
from reference import random_media

from avocado_jax.data.prompt import Habits, chat_prompt
from avocado_jax.data.records import Record
from avocado_jax.data.rows import make_row
from avocado_jax.data.tokenizer import write_tokenizer
from avocado_jax.data.words import load_words
from avocado_jax.errors import InputError
from avocado_jax.models.config import TINY, computed
from avocado_jax.models.thinker import init
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.rules import shardings
from avocado_jax.sampling.captioner import captioner_in_training, captioner_of
from avocado_jax.sampling.engine import caption_records
from avocado_jax.sampling.weights import unstacked

SMALL = replace(TINY, audio=replace(TINY.audio, layers=1), vision=replace(TINY.vision, layers=2))
CONFIG = computed(SMALL, "float32", scan=True)
STOPS = (258, 256)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return load_words(folder)


@pytest.fixture(scope="module")
def params():
    """Random weights with O(1) logits, stacked."""
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(partial(init, CONFIG), jax.random.key(0))

    def draw(path, leaf):
        scale = 1.0 if path[0].key == "embedding" else 0.3 if len(leaf.shape) < 3 else leaf.shape[-2] ** -0.5
        return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * scale + (path[-1].key == "scale"))

    return jax.tree_util.tree_map_with_path(draw, shapes)


def records():
    """Clips of different sizes, one silent, one with its own question, and one that cannot be read."""
    sizes = [(4, 56, 84, 16000), (6, 112, 56, None), (2, 28, 140, 40000)]
    media = [random_media(*size, seed=i) for i, size in enumerate(sizes)]
    fields = [{"id": "a"}, {"id": "b"}, {"id": "c", "prompt": "Who is it?"}, {"id": "d"}]
    return [Record(each, clip, each["id"]) for each, clip in zip(fields, [*media, b"no video"])]


def test_prompt_of_a_row(tokenizer):
    """Fields of the row, else the prompt settings of the checkpoint."""
    clip = random_media(4, 56, 84, 16000)
    captioner = captioner_of(CONFIG, {}, tokenizer, STOPS, "What?", habits=Habits(system="", media_first=False))
    for fields, expected in (
        ({}, ("What?", "", False)),
        ({"prompt": "Who?", "system": "S", "media_first": True}, ("Who?", "S", True)),
    ):
        ids = make_row(clip, chat_prompt(tokenizer, *expected), CONFIG).prompt_ids
        assert captioner.row(clip, fields).prompt_ids.tolist() == ids.tolist()


def test_unstacked_layers_equal_the_stack(params):
    per_layer = jax.jit(unstacked)(params)
    assert set(per_layer["text"]) == {"norm", "layers_0", "layers_1"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(per_layer):
        node, layer = params, None
        for key in path:
            if key.key.startswith("layers_"):
                layer = int(key.key.removeprefix("layers_"))
            node = node["layers" if key.key.startswith("layers_") else key.key]
        np.testing.assert_array_equal(leaf, node if layer is None else node[layer])
    born = jax.eval_shape(partial(init, computed(CONFIG, "float32", scan=False)), jax.random.key(0))
    assert jax.tree.map(np.shape, per_layer) == jax.tree.map(lambda leaf: leaf.shape, born)


def test_captions_in_training_do_not_depend_on_the_mesh(params, tokenizer, monkeypatch):
    single = captioner_in_training(CONFIG, params, tokenizer, STOPS, "What?", "float32")
    expected = caption_records(single, records(), 6, slots=2)
    assert expected[3] is None
    assert len(set(expected)) > 2

    mesh = make_mesh(data=1, fsdp=2, tensor=2, devices=jax.devices()[:4])
    divided = jax.device_put(params, shardings(params, mesh))
    captioner = captioner_in_training(CONFIG, divided, tokenizer, STOPS, "What?", "float32")
    kernel = captioner.params["text"]["layers_1"]["mlp"]["up"]["kernel"]
    assert kernel.sharding.spec == PartitionSpec("fsdp", "tensor")
    assert caption_records(captioner, records(), 6, slots=4) == expected
    assert caption_records(captioner, records()[3:], 6, slots=4) == [None]

    # Another process cannot read the first clip: no process captions it.
    gathered = [np.array([False, True, True, True])]
    with monkeypatch.context() as patch:
        patch.setattr(jax, "process_count", lambda: 2)
        patch.setattr(multihost_utils, "process_allgather", lambda read: np.stack([read, *gathered]))
        assert caption_records(single, records(), 6, slots=2) == [None, *expected[1:]]

    half = captioner_in_training(CONFIG, params, tokenizer, STOPS, "What?", "bfloat16")
    assert half.config.dtype == "bfloat16"
    assert {leaf.dtype.name for leaf in jax.tree.leaves(half.params)} == {"bfloat16"}


def test_tokenizer_of_another_vocabulary_is_refused(tokenizer):
    small = replace(CONFIG, text=replace(CONFIG.text, vocab=200))
    with pytest.raises(InputError, match="makes id 258, the vocabulary ends at 200"):
        captioner_of(small, {}, tokenizer, STOPS, "What?")

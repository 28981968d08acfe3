"""Memory and traffic of compiled training programs on eight devices; nothing is run."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from avocado_jax.config import SftConfig
from avocado_jax.models.config import TINY
from avocado_jax.models.thinker import example
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.place import rows_sharding
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.collectives import collective_bytes
from avocado_jax.train import losses
from avocado_jax.train.sft import sft_program
from avocado_jax.train.state import split
from avocado_jax.typing import Captions

DEVICES, ROWS = 8, 8
# Many layers, so that one gathered layer is small beside a device's part of the gradient; few tokens.
DEEP = replace(TINY, remat="full", text=replace(TINY.text, layers=96, width=128, ffn=512, vocab=64))
DEEP = replace(DEEP, audio=replace(TINY.audio, out=128), vision=replace(TINY.vision, out=128))


def shapes_on(mesh, tree):
    """ShapeDtypeStructs divided by rows."""
    by_rows = rows_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_rows), tree)


@pytest.mark.parametrize("remat", ["full"])
def test_an_update_has_one_gradient_tree_and_gathers_each_weight_twice(remat):
    """Once in the forward pass and once in the backward pass; each gradient is reduced once."""
    config = SftConfig(batch=ROWS, dtype="float32", frozen_dtype="float32", remat=remat)
    mesh = make_mesh(1, DEVICES, 1)
    with jax.set_mesh(mesh):
        state, step, _ = sft_program(config, replace(DEEP, remat=remat), mesh, 10)
        clip, captions = example(DEEP, ROWS, 2, (16, 1, 1, 1), 4)
        row = [jax.ShapeDtypeStruct((ROWS,), dtype) for dtype in (jnp.float32, jnp.int32)]
        compiled = step.lower(state, *shapes_on(mesh, (clip, captions, *row))).compile()
    trained = split(state.params, "captioner")[0]
    tree, layers = bytes_per_device(trained), sum(leaf.size * 4 for leaf in jax.tree.leaves(trained["text"]["layers"]))
    temporaries = compiled.memory_analysis().temp_size_in_bytes
    sent = collective_bytes(compiled.as_text())
    share = (DEVICES - 1) / DEVICES  # of what it gathers, a device receives
    print(temporaries / tree, sent["all-gather"] / layers / share, sent["all-reduce"] / layers / share / 2)
    assert temporaries <= 1.2 * tree
    assert sent["all-gather"] <= 2.1 * layers * share
    assert sent["all-reduce"] / 2 + sent["reduce-scatter"] <= 1.1 * layers * share


@pytest.mark.parametrize(("sizes", "parts"), [((1, 8, 1), 8), ((1, 4, 2), 4)])
def test_the_loss_gathers_the_output_matrix_once(sizes, parts, monkeypatch):
    """However many chunks it takes, forward and backward pass together; its gradient is reduced once."""
    vocabulary, width, tokens = 512, 64, 40
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * vocabulary * 10)
    mesh = make_mesh(*sizes)
    tensor = sizes[2]

    def loss(head, hidden, captions, weight):
        return losses.caption_sums(hidden, head, captions, weight).loss

    ids = jax.ShapeDtypeStruct((ROWS, 1, tokens), jnp.int32)
    hidden = jax.ShapeDtypeStruct((ROWS, 1, tokens, width), jnp.float32)
    valid, weight = jax.ShapeDtypeStruct(ids.shape, bool), jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    stored = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    head = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32, sharding=stored)
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.grad(loss), out_shardings=stored)
        text = grad.lower(head, *shapes_on(mesh, (hidden, Captions(ids, ids, valid), weight))).compile().as_text()
    sent, matrix = collective_bytes(text), vocabulary * width * 4 / tensor
    assert sent["all-gather"] == matrix * (parts - 1) / parts
    small = ROWS // parts * tokens * (3 * 4 + 4) * 2 if tensor > 1 else 64  # of each token: log-sum-exp and the rest
    assert sent["reduce-scatter"] + sent["all-reduce"] <= matrix * (parts - 1) / parts * 2 + small

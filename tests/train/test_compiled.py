"""Memory and traffic of compiled training programs on eight devices; nothing is run."""

from dataclasses import replace

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
from avocado_jax.train.optim import gradient
from avocado_jax.train.sft import batch_sums, sft_program
from avocado_jax.train.state import join, split
from avocado_jax.typing import Captions

DEVICES, ROWS = 8, 8
# Many layers, so that one gathered layer is small beside a device's part of all gradients; few tokens.
DEEP = replace(
    TINY,
    remat="full",
    text=replace(TINY.text, layers=256, width=128, ffn=512, vocab=64),
    audio=replace(TINY.audio, out=128),
    vision=replace(TINY.vision, out=128),
)
CONFIG = SftConfig(batch=ROWS, dtype="float32", frozen_dtype="float32", remat="full")


def shapes_on(mesh, tree):
    """ShapeDtypeStructs divided by rows."""
    by_rows = rows_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=by_rows), tree)


def batch_on(mesh):
    """Rows of a short clip and two captions."""
    clip, captions = example(DEEP, ROWS, 2, (16, 1, 1, 1), 4)
    return shapes_on(mesh, (clip, captions, jax.ShapeDtypeStruct((ROWS,), jnp.float32)))


def test_the_gradient_takes_the_memory_of_one_tree():
    """Temporaries and result. The optimizer is left out: the CPU's compiler copies what it updates in place."""
    mesh = make_mesh(1, DEVICES, 1)

    def loss(trained, frozen, *batch):
        sums = batch_sums(DEEP, join(trained, frozen), *batch)
        return sums.loss, sums

    def run(trained, frozen, *batch):
        return gradient(lambda trained, *rows: loss(trained, frozen, *rows), trained, batch, 1)[0]

    with jax.set_mesh(mesh):
        state, *_ = sft_program(CONFIG, DEEP, mesh, 10)
        trained, frozen = split(state.params, "captioner")
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
        compiled = jax.jit(run, out_shardings=shardings).lower(trained, frozen, *batch_on(mesh)).compile()
    memory, tree = compiled.memory_analysis(), bytes_per_device(trained)
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 1.2 * tree


def test_an_update_gathers_each_weight_twice_and_reduces_each_gradient_once():
    """A weight is gathered once in the forward pass and once in the backward pass, for clip and captions together."""
    mesh = make_mesh(1, DEVICES, 1)
    with jax.set_mesh(mesh):
        state, step, _ = sft_program(CONFIG, DEEP, mesh, 10)
        cut = shapes_on(mesh, jax.ShapeDtypeStruct((ROWS,), jnp.int32))
        text = step.lower(state, *batch_on(mesh), cut).compile().as_text()
    sent = collective_bytes(text)
    layers = sum(4 * leaf.size for leaf in jax.tree.leaves(state.params["text"]["layers"])) * (DEVICES - 1) / DEVICES
    assert sent["all-gather"] <= 2.1 * layers
    assert sent["all-reduce"] / 2 + sent["reduce-scatter"] <= 1.05 * layers


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
        grad = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (stored, rows_sharding(mesh))))
        text = grad.lower(head, *shapes_on(mesh, (hidden, Captions(ids, ids, valid), weight))).compile().as_text()
    sent, matrix = collective_bytes(text), vocabulary * width * 4 / tensor
    assert sent["all-gather"] == matrix * (parts - 1) / parts
    assert sent["reduce-scatter"] == matrix * (parts - 1) / parts
    of_token = 4 + 3 * 4 + 4 * width  # maximum, three sums, gradient of the hidden state: summed over `tensor`
    over_tensor = 2 * ROWS // parts * tokens * of_token * (tensor - 1) / tensor
    assert sent["all-reduce"] <= over_tensor + 16  # and the loss itself

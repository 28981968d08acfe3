"""Memory and traffic of compiled training programs on eight devices; nothing is run."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from avocado_jax.config import GrpoConfig, SamplingConfig
from avocado_jax.models.config import TINY
from avocado_jax.models.thinker import example
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.rules import bytes_per_device
from avocado_jax.planning.collectives import collective_bytes
from avocado_jax.train import losses
from avocado_jax.train.grpo import Experience, Scored, batch_gradient, grpo_program
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.state import split
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
GROUP, TOKENS = 2, 4
CONFIG = GrpoConfig(
    batch=ROWS,
    group=GROUP,
    dtype="float32",
    frozen_dtype="float32",
    remat="full",
    sampling=SamplingConfig(tokens=TOKENS),
)


def shard_rows(mesh, tree):
    """The shapes of `tree` with rows divided over the mesh."""
    sharding = rows_sharding(mesh)
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), tree)


def experience(params, program):
    """An update's input of a short clip, as shapes."""
    clip, captions = example(DEEP, ROWS, GROUP, (16, 1, 1, 1), TOKENS)
    encoded = jax.eval_shape(program.encode, params, clip)
    row, each, token = (
        jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((ROWS,), (ROWS, GROUP), (ROWS, GROUP, TOKENS))
    )
    lengths, truncated = (jax.ShapeDtypeStruct(each.shape, dtype) for dtype in (jnp.int32, bool))
    return Experience(clip, encoded, Rollout(captions, token, lengths, truncated), Scored(None, token), each, row)


def test_gradient_takes_one_tree_and_two_gathers_per_weight():
    """A weight is gathered in the forward and in the backward pass; its gradient is reduced once.

    Memory is that of temporaries and result. The optimizer is excluded, since XLA copies donated arguments on CPU.
    """
    mesh = make_mesh(1, DEVICES, 1)
    with jax.set_mesh(mesh):
        program = grpo_program(CONFIG, DEEP, mesh, 10, (0,))
        params = program.state.params
        trained = split(params, CONFIG.train)[0]
        shardings = jax.tree.map(lambda leaf: leaf.sharding, trained)
        run = jax.jit(partial(batch_gradient, model=DEEP, config=CONFIG), out_shardings=(shardings, None, None))
        compiled = run.lower(params, shard_rows(mesh, experience(params, program))).compile()
    memory, tree = compiled.memory_analysis(), bytes_per_device(trained)
    assert memory.temp_size_in_bytes + memory.output_size_in_bytes <= 1.2 * tree
    sent = collective_bytes(compiled.as_text())
    layers = sum(4 * leaf.size for leaf in jax.tree.leaves(params["text"]["layers"])) * (DEVICES - 1) / DEVICES
    assert sent["all-gather"] <= 2.1 * layers
    assert sent["all-reduce"] / 2 + sent["reduce-scatter"] <= 1.05 * layers


@pytest.mark.parametrize(("sizes", "parts"), [((1, 8, 1), 8), ((1, 4, 2), 4)])
def test_the_loss_gathers_the_output_matrix_once(sizes, parts, monkeypatch):
    """Once in forward and backward pass together, for any number of chunks; its gradient is reduced once."""
    vocabulary, width, tokens = 512, 64, 40
    monkeypatch.setattr(losses, "LOGITS_BYTES", 4 * vocabulary * 10)
    mesh = make_mesh(*sizes)
    tensor = sizes[2]

    def loss(head, hidden, captions, weight):
        return losses.loss_totals(hidden, head, captions, weight).loss

    ids = jax.ShapeDtypeStruct((ROWS, 1, tokens), jnp.int32)
    hidden = jax.ShapeDtypeStruct((ROWS, 1, tokens, width), jnp.float32)
    valid, weight = jax.ShapeDtypeStruct(ids.shape, bool), jax.ShapeDtypeStruct((ROWS,), jnp.float32)
    stored = NamedSharding(mesh, PartitionSpec("tensor", "fsdp"))
    head = jax.ShapeDtypeStruct((vocabulary, width), jnp.float32, sharding=stored)
    with jax.set_mesh(mesh):
        grad = jax.jit(jax.value_and_grad(loss, (0, 1)), out_shardings=(None, (stored, rows_sharding(mesh))))
        text = grad.lower(head, *shard_rows(mesh, (hidden, Captions(ids, ids, valid), weight))).compile().as_text()
    sent, matrix = collective_bytes(text), vocabulary * width * 4 / tensor
    assert sent["all-gather"] == matrix * (parts - 1) / parts
    assert sent["reduce-scatter"] == matrix * (parts - 1) / parts
    of_token = 4 + 3 * 4 + 4 * width  # maximum, three sums, gradient of the hidden state: summed over `tensor`
    over_tensor = 2 * ROWS // parts * tokens * of_token * (tensor - 1) / tensor
    assert sent["all-reduce"] <= over_tensor + 16  # and the loss itself

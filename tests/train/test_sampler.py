"""The sampler equals the trained policy in bf16, with low-rank adapters after small updates, at temperature 0.7."""

from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.bench.model import random_clip
from avocado_jax.config import GrpoConfig, LoraConfig, ObjectiveConfig, OptimConfig, SamplingConfig
from avocado_jax.models.config import TINY, Lora
from avocado_jax.models.int8 import quantized
from avocado_jax.models.lora import TextDense
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train import run
from avocado_jax.train.grpo import grpo_program
from avocado_jax.train.health import SAMPLER_GAP
from avocado_jax.train.optim import optimizer
from avocado_jax.train.sft import model_of
from avocado_jax.train.state import apply_gradient, split

UPDATES = 20
SCALE = 2.0  # alpha / rank
CONFIG = GrpoConfig(
    batch=2,
    group=4,
    passes=2,  # so that `score` computes the policy's log-probabilities
    train="lora",
    lora=LoraConfig(rank=4, alpha=8.0),
    remat="none",
    sampling=SamplingConfig(tokens=12, temperature=0.7),
    objective=ObjectiveConfig(beta=0.0),
    optim=OptimConfig(lr=1e-5, warmup=0.0),
)
MODEL = model_of(CONFIG, TINY)
MESH = make_mesh(1, 1, 1, devices=jax.devices()[:1])


def random_leaf(path, leaf):
    """Random weights with O(1) logits; fresh adapters."""
    rng, name = np.random.default_rng(len(str(path))), path[-1].key
    if name in ("scale", "lora_b"):
        return jnp.full(leaf.shape, float(name == "scale"), leaf.dtype)
    scale = 1.0 if name == "embedding" else 0.3 if len(leaf.shape) < 3 else leaf.shape[-2] ** -0.5
    return jnp.asarray(rng.standard_normal(leaf.shape, np.float32) * scale, leaf.dtype)


@pytest.fixture(scope="module")
def policy():
    """A program and parameters after 20 updates of the optimizer at lr 1e-5, on gradients that keep their direction."""
    with jax.set_mesh(MESH):
        program = grpo_program(CONFIG, MODEL, MESH, UPDATES, (258,))
        state = program.begin(jax.tree_util.tree_map_with_path(random_leaf, program.state.params))
        adamw = optimizer(CONFIG.optim, UPDATES)
        leaves, tree = jax.tree.flatten(split(state.params, "lora")[0])
        keys = jax.random.split(jax.random.key(1), len(leaves))
        gradient = tree.unflatten(jax.random.normal(key, leaf.shape) for key, leaf in zip(keys, leaves))

        @jax.jit
        def trained_params(state):
            update = lambda _, state: apply_gradient(state, gradient, jnp.bool_(True), adamw, "lora")[0]  # noqa: E731
            return jax.lax.fori_loop(0, UPDATES, update, state).params

        yield program, trained_params(state)


def test_sampler_weights_keep_small_updates(policy):
    """The sampler's weights contain the trained update; merged into bf16, most of it would be rounded away."""
    program, params = policy
    weights, flat = flatten_dict(program.view(params)), flatten_dict(params)
    modules = [path[:-1] for path in flat if path[-1] == "lora_a"]
    assert len(modules) == 7
    for module in modules:
        kernel, a, b = (np.asarray(flat[*module, name], np.float32) for name in ("kernel", "lora_a", "lora_b"))
        assert flat[*module, "kernel"].dtype == "bfloat16"
        update = SCALE * a @ b
        for layer, exact in enumerate(update):
            path = tuple(f"layers_{layer}" if key == "layers" else key for key in module)
            weight = {name: np.asarray(weights[*path, name], np.float32) for name in ("kernel", "lora_a", "lora_b")}
            kept = weight["kernel"] + SCALE * weight["lora_a"] @ weight["lora_b"] - kernel[layer]
            assert np.linalg.norm(kept - exact) < 0.01 * np.linalg.norm(exact)
        merged = np.asarray((kernel + update).astype(jnp.bfloat16), np.float32) - kernel
        assert np.linalg.norm(merged - update) > 0.5 * np.linalg.norm(update)


def test_int8_kernels_are_rounded_once():
    """Each weight is within half a level of its channel, and a layer computes with the rounded weights."""
    kernel = np.float32(np.random.default_rng(0).standard_normal((2, 24, 8)) * np.logspace(-3, 3, 8))
    kernel[1, :, 2] = 0
    layer = {"q": {"kernel": jnp.asarray(kernel), "bias": jnp.ones((2, 8))}}
    found = quantized({"text": {"layers": layer}, "vision": {"kernel": jnp.asarray(kernel)}}, "bfloat16")
    np.testing.assert_array_equal(found["vision"]["kernel"], kernel)
    levels, scale = (np.asarray(found["text"]["layers"]["q"][name]) for name in ("kernel", "kernel_scale"))
    assert (levels.dtype, scale.dtype) == ("int8", "bfloat16")
    scale = scale.astype(np.float32)
    assert np.abs(levels.astype(int)).max(axis=1)[kernel.any(axis=1)].min() >= 126
    assert (np.abs(levels * scale[:, None] - kernel) <= (0.5 + 127 * 2**-8) * scale[:, None]).all()
    x = jnp.asarray(np.random.default_rng(1).standard_normal((3, 24)), jnp.float32)
    module = TextDense(8, True, "float32", "float32", None, True)
    params = {"kernel": levels[0], "kernel_scale": scale[0], "bias": np.ones(8, np.float32)}
    expected = np.asarray(x) @ (levels[0] * scale[0]) + 1
    np.testing.assert_allclose(module.apply({"params": params}, x), expected, rtol=1e-4)


@pytest.mark.parametrize(
    ("large", "int8", "bound"), [(False, False, 0.02), (True, False, SAMPLER_GAP), (True, True, 2 * SAMPLER_GAP)]
)
def test_sampler_and_trainer_agree_in_bf16(policy, large, int8, bound):
    """Mean difference in nats, with adapters after 20 small updates and with adapters that change every logit."""
    program, params = policy
    sampler = program
    if int8:
        objective = ObjectiveConfig(beta=0.0, importance_cap=2.0)
        sampler = grpo_program(replace(CONFIG, rollout_int8=True, objective=objective), MODEL, MESH, UPDATES, (258,))
    if large:
        flat = flatten_dict(params)
        for number, path in enumerate(path for path in flat if path[-1] == "lora_b"):
            flat[path] = 0.3 * jax.random.normal(jax.random.key(number), flat[path].shape)
        params = unflatten_dict(flat)
    clip = jax.tree.map(lambda leaf: jnp.repeat(leaf, CONFIG.batch, 0), random_clip(TINY, 100, (4, 4)))
    shapes, rng = jax.eval_shape(program.encode, params, clip), np.random.default_rng(2)
    encoded = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    banned = jnp.arange(TINY.text.vocab) >= 259
    view = sampler.view(params)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(view)} == ({"bfloat16", "int8"} if int8 else {"bfloat16"})
    (rollout,) = sampler.roll_out(view, (clip,), (encoded,), jnp.int32(0), banned)
    score = partial(program.score, reference={}, clip=clip, encoded=encoded, captions=rollout.captions)
    valid, sampled = np.asarray(rollout.captions.valid), np.asarray(rollout.sampled)
    gap = np.abs(np.asarray(score(params).old) - sampled)[valid]
    assert gap.mean() < bound
    assert gap.max() < 10 * bound
    if large:  # the bound finds a sampler without adapters
        without = np.abs(np.asarray(score(policy[1]).old) - sampled)[valid]
        assert without.mean() > 5 * SAMPLER_GAP


def test_held_out_captions_use_the_adapters(monkeypatch, policy):
    captioners = []
    monkeypatch.setattr(run, "captioner_in_training", lambda *args: captioners.append(args))
    monkeypatch.setattr(run, "caption_records", lambda *_: [])
    recipe = SimpleNamespace(config=MODEL, words=None, prompts=("What?",), reading=None, habits=None)
    run._captions(SimpleNamespace(dtype="bfloat16", sample_tokens=4), recipe, policy[1], (258,), [])
    ((model, params, *_),) = captioners
    assert model.text.lora == Lora(4, 8.0)
    assert params is policy[1]

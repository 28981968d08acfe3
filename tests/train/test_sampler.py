"""The sampler equals the trained policy in bf16, with low-rank adapters after small updates, at temperature 0.7."""

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
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = grpo_program(CONFIG, MODEL, mesh, UPDATES, (258,))
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


@pytest.mark.parametrize(("large", "bound"), [(False, 0.02), (True, SAMPLER_GAP)])
def test_sampler_and_trainer_agree_in_bf16(policy, large, bound):
    """Mean difference in nats, with adapters after 20 small updates and with adapters that change every logit."""
    program, params = policy
    if large:
        flat = flatten_dict(params)
        for number, path in enumerate(path for path in flat if path[-1] == "lora_b"):
            flat[path] = 0.3 * jax.random.normal(jax.random.key(number), flat[path].shape)
        params = unflatten_dict(flat)
    clip = jax.tree.map(lambda leaf: jnp.repeat(leaf, CONFIG.batch, 0), random_clip(TINY, 100, (4, 4)))
    shapes, rng = jax.eval_shape(program.encode, params, clip), np.random.default_rng(2)
    encoded = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), leaf.dtype), shapes)
    banned = jnp.arange(TINY.text.vocab) >= 259
    (rollout,) = program.roll_out(program.view(params), (clip,), (encoded,), jnp.int32(0), banned)
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

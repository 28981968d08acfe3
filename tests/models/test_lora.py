"""Adapters: fresh adapters are the identity, merged ones are exact, and only adapters are trained."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from adapters import merge
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.models.config import TINY, Lora
from avocado_jax.models.lora import add_adapters
from avocado_jax.models.text import TextModel
from avocado_jax.models.thinker import init

LORA = Lora(rank=4, alpha=8.0)
SCALE = 2.0  # alpha / rank
X = np.random.default_rng(0).standard_normal((2, 6, TINY.text.width)).astype(np.float32)
INPUTS = jnp.asarray(X), jnp.broadcast_to(jnp.arange(6)[:, None], (2, 6, 3))


def config_with_lora(config):
    return replace(config, text=replace(config.text, lora=LORA))


def init_params(config):
    """Parameters of the language model."""
    return TextModel(config).init(jax.random.key(1), *INPUTS)["params"]


def hidden_states(config, params):
    """Hidden states of the language model."""
    return TextModel(config).apply({"params": params}, *INPUTS)[0]


def random_adapters(params):
    """Non-zero adapters."""
    flat = flatten_dict(params)
    for i, path in enumerate(path for path in sorted(flat) if path[-1] == "lora_b"):
        flat[path] = jax.random.normal(jax.random.key(i), flat[path].shape, flat[path].dtype)
    return unflatten_dict(flat)


@pytest.mark.parametrize("scan", [True, False])
def test_fresh_adapters_are_identity_and_merging_is_exact(scan):
    plain = replace(TINY, scan=scan)
    adapted = config_with_lora(plain)
    params = init_params(adapted)
    base = unflatten_dict({path: leaf for path, leaf in flatten_dict(params).items() if "lora" not in path[-1]})
    before = hidden_states(plain, base)
    np.testing.assert_array_equal(hidden_states(adapted, params), before)
    params = random_adapters(params)
    changed, merged = hidden_states(adapted, params), hidden_states(plain, merge(params, SCALE))
    assert np.abs(changed - before).max() > 0.1
    np.testing.assert_allclose(changed, merged, atol=1e-5 * np.abs(merged).max())
    assert jax.tree.structure(merge(params, SCALE)) == jax.tree.structure(base)


def test_every_linear_layer_of_the_language_model_has_an_adapter():
    leaves = flatten_dict(jax.eval_shape(partial(init, config_with_lora(TINY)), jax.random.key(0)), sep="/")
    adapters = {path for path in leaves if "lora" in path}
    maps = [f"text/layers/{name}" for name in ("q", "k", "v", "out", "mlp/gate", "mlp/up", "mlp/down")]
    assert adapters == {f"{path}/{name}" for path in maps for name in ("lora_a", "lora_b")}
    assert leaves["text/layers/mlp/down/lora_a"].shape == (TINY.text.layers, TINY.text.ffn, LORA.rank)


def test_adapters_receive_gradients():
    """B has a gradient from the first step on, A once B is not zero."""
    gradient = jax.jit(jax.grad(lambda params: jnp.sum(hidden_states(config_with_lora(TINY), params) * X)))
    fresh = init_params(config_with_lora(TINY))
    for params, learns_a in ((fresh, False), (random_adapters(fresh), True)):
        for path, leaf in flatten_dict(gradient(params)).items():
            if "lora" in path[-1]:
                assert bool(np.all(np.any(np.asarray(leaf) != 0, axis=(1, 2)))) == (path[-1] == "lora_b" or learns_a)


def test_fresh_adapters_are_initialised_sharded():
    adapted, device = config_with_lora(TINY), jax.sharding.SingleDeviceSharding(jax.devices()[1])
    tree = jax.eval_shape(partial(init, adapted), jax.random.key(0))
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), tree)
    plain = jax.eval_shape(partial(init, TINY), jax.random.key(0))
    base = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), plain)
    params = add_adapters(base, like, seed=0)
    assert jax.tree.structure(params) == jax.tree.structure(tree)
    down = params["text"]["layers"]["mlp"]["down"]
    assert down["lora_a"].sharding == device
    assert not np.any(down["lora_b"])
    bound = TINY.text.ffn**-0.5
    assert 0.9 * bound < np.abs(down["lora_a"]).max() <= bound
    assert not np.array_equal(down["lora_a"][0], down["lora_a"][1])

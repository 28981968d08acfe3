"""Dtypes and remat of the config, and FLOP counts."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from reference import random_media, rows_of

from avocado_jax.data.rows import shape_of, stack
from avocado_jax.models.config import REMAT, SEVEN_B, TINY, computed
from avocado_jax.models.flops import (
    decode_bytes,
    kv_bytes,
    row_flops,
    train_flops,
)
from avocado_jax.models.thinker import Thinker, example, init


def equations(jaxpr):
    """All equations, including those of inner jaxprs."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def trace_forward(config):
    """The jaxpr of a forward pass."""
    clip, captions = example(config)
    params = jax.eval_shape(partial(init, config), jax.random.key(0))
    return jax.make_jaxpr(lambda params: Thinker(config).apply({"params": params}, clip_zeros(clip), zeros(captions)))(
        params
    )


def zeros(tree):
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree)


clip_zeros = zeros


@pytest.mark.parametrize("scan", [True, False])
def test_reductions_are_fp32_and_products_bf16(scan):
    """Under bfloat16: norms, softmaxes and angles in fp32; products of weights in bfloat16."""
    jaxpr = trace_forward(computed(TINY, "bfloat16", scan))
    by_primitive = {}
    for equation in equations(jaxpr.jaxpr):
        name = equation.primitive.name
        dtypes = {str(value.aval.dtype) for value in equation.invars if hasattr(value.aval, "dtype")}
        by_primitive.setdefault(name, []).append(
            (dtypes, str(equation.outvars[0].aval.dtype) if equation.outvars else "")
        )
    for name in ("rsqrt", "exp", "log", "cos", "sin", "reduce_max"):
        assert by_primitive[name], name
        assert all(dtypes == {"float32"} for dtypes, _ in by_primitive[name]), name
    products = by_primitive["dot_general"]
    assert all(dtypes == {"bfloat16"} for dtypes, _ in products)
    assert {out for _, out in products} == {"bfloat16", "float32"}  # scores are fp32
    assert all(dtypes == {"bfloat16"} for dtypes, _ in by_primitive["conv_general_dilated"])


@pytest.mark.slow
def test_bf16_is_near_fp32():
    config = computed(TINY, "float32", scan=False)
    params = jax.jit(partial(init, config))(jax.random.key(0))
    (row,) = rows_of([random_media(4, 56, 84, 16000)], config)
    clip = jax.tree.map(jnp.asarray, stack([row.clip], shape_of(row.clip)))
    embed = {
        dtype: jax.jit(partial(Thinker(computed(TINY, dtype, scan=False)).apply, method="embed"))(
            {"params": jax.tree.map(lambda leaf, dtype=dtype: leaf.astype(dtype), params)}, clip
        )
        for dtype in ("float32", "bfloat16")
    }
    assert embed["bfloat16"].dtype == jnp.bfloat16
    difference = np.abs(np.asarray(embed["bfloat16"], np.float32) - embed["float32"])
    assert difference.max() <= 0.03 * np.abs(embed["float32"]).max()


@pytest.mark.parametrize("remat", REMAT)
@pytest.mark.parametrize("scan", [True, False])
def test_remat_policy_of_the_config_is_applied(scan, remat):
    names = {
        equation.primitive.name for equation in equations(trace_forward(computed(TINY, "float32", scan, remat)).jaxpr)
    }
    assert ("remat2" in names or "checkpoint" in names or "remat" in names) == (remat != "none")
    assert "scan" in names  # one layer is compiled for each stack in both layouts


@pytest.mark.slow
def test_remat_policy_does_not_change_gradients():
    clip, captions = (zeros(part) for part in example(TINY, rows=2, group=2))
    params = jax.jit(partial(init, computed(TINY, "float32", scan=True)))(jax.random.key(0))

    def gradients(remat):
        model = Thinker(computed(TINY, "float32", True, remat))
        return jax.jit(jax.grad(lambda params: jnp.sum(jnp.sin(model.apply({"params": params}, clip, captions)))))(
            params
        )

    expected, *others = map(gradients, REMAT)
    for found in others:
        for one, other in zip(*map(jax.tree.leaves, (found, expected))):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(1, np.abs(other).max()))


def test_flop_counts_of_the_published_sizes():
    """Independent counts of the 7B thinker: FLOPs per token, patch and second of sound; cache bytes."""

    def count(tokens, patches=0, windows=0, chunks=0, group=0, caption=0):
        return row_flops(SEVEN_B, (tokens, patches, windows, chunks), group, caption)

    assert count(1).layers == pytest.approx(13.05e9, rel=1e-3)
    assert count(0, group=1, caption=1).logits == pytest.approx(1.09e9, rel=1e-3)
    assert count(1000, group=1, caption=1).attention == 401_408 * (1000 * 500 + 1000 + 0.5)
    assert count(0, patches=1, windows=30).total / 1920 == pytest.approx(1.3e9, rel=0.05)
    assert count(0, chunks=1).total / 50 == pytest.approx(2.5e9, rel=0.05)
    assert kv_bytes(SEVEN_B, 2) == 57_344
    weights = 2 * (7_070_619_136 - 544_997_376 + 544_997_376)  # layers and output matrix; norms and biases are small
    assert decode_bytes(SEVEN_B, 0, 8, 0, 2) == pytest.approx(weights, rel=1e-3)


def test_training_flops_are_the_sum_of_their_parts():
    """The backward pass of each part counts only the gradients that it needs."""
    shape, group, caption = (16384, 29, 40, 15), 2, 640
    row = row_flops(SEVEN_B, shape, group, caption)
    text = row.layers + row.attention + row.logits
    frozen = train_flops(SEVEN_B, shape, group, caption)
    assert frozen == pytest.approx(
        3 * text + 3 * row.adapters + 2 * row.adapter_entry + row.towers + row.entry, rel=1e-12
    )
    whole = train_flops(SEVEN_B, shape, group, caption, "all")
    assert whole == pytest.approx(3 * row.total - row.entry, rel=1e-12)
    lora = train_flops(SEVEN_B, shape, group, caption, "lora")
    assert frozen - lora == pytest.approx(row.layers + row.logits, rel=1e-12)
    for remat, again in (("none", 0), ("dots", row.attention), ("full", row.attention + row.layers)):
        config = replace(SEVEN_B, remat=remat)
        assert train_flops(config, shape, group, caption, recomputed=True) - frozen == pytest.approx(again, rel=1e-9)

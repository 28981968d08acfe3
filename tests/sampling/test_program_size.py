"""The size of the sampling programs, which determines their compile time, by the number of layers."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp

from avocado_jax.models.config import TINY, computed
from avocado_jax.models.thinker import Thinker, example, init
from avocado_jax.sampling.generate import generate
from avocado_jax.sampling.logits import Sampling

DECODE_DOTS = 11  # of a layer: q, k, v, out, gate, up, down; scores and sums of the clip's values and the caption's
DECODE_LINES = 260  # of a layer
GROUP, LENGTH = 8, 16


def lowered(layers, run):
    """Operations and matmuls of `run(config, params, clip)`, lowered for models with `layers` layers per stack."""
    parts = {name: replace(getattr(TINY, name), layers=layers) for name in ("text", "vision", "audio")}
    config = computed(replace(TINY, **parts), "bfloat16", scan=False)
    params = jax.eval_shape(partial(init, config), jax.random.key(0))
    clip, _ = example(config, rows=2)
    text = jax.jit(partial(run, config)).lower(params, clip).as_text()
    return len(text.splitlines()), text.count("stablehlo.dot_general")


def prefill(config, params, clip):
    return Thinker(config).apply({"params": params}, clip, method="prefill")


def sample(config, params, clip):
    keys = jax.random.split(jax.random.key(0), (2, GROUP))
    banned = jnp.zeros(config.text.vocab, bool)
    options = dict(config=config, sampling=Sampling(1.0), stops=(0,), length=LENGTH)
    return generate(params, clip, keys, banned, **options)


def test_prefill_has_one_body_for_all_layers():
    (_, few), (_, many) = (lowered(layers, prefill) for layers in (2, 5))
    assert few == many > 0


def test_decoding_has_one_body_for_each_layer():
    (few_lines, few), (lines, many) = (lowered(layers, sample) for layers in (2, 5))
    assert many - few == 3 * DECODE_DOTS
    assert lines - few_lines < 3 * DECODE_LINES

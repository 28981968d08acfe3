"""Attention against a plain softmax: in one piece, in chunks, merged from parts, and by each platform's kernel."""

import os
import subprocess
import sys
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.config import SftConfig, SplashConfig, load
from avocado_jax.errors import InputError
from avocado_jax.models.attention import backend, cudnn, splash
from avocado_jax.models.attention import plain as attention
from avocado_jax.models.attention.plain import attend, merge
from avocado_jax.models.cache import KV
from avocado_jax.models.config import TINY, Kernel, SplashBlocks
from avocado_jax.models.thinker import Thinker, example, init
from avocado_jax.train.sft import model_of

ROWS, QUERIES, KEYS, HEADS, KV_HEADS, WIDTH = 2, 50, 70, 4, 2, 8


def random_qkv(seed=0, queries=QUERIES):
    """q [B Q H E], k and v [B K S E]."""
    keys = jax.random.split(jax.random.key(seed), 3)
    shapes = (ROWS, queries, HEADS, WIDTH), *[(ROWS, KV_HEADS, KEYS, WIDTH)] * 2
    return [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]


def reference_attention(q, k, v, valid=None, causal=False):
    """The formula, head by head."""
    k, v = (jnp.repeat(part, HEADS // KV_HEADS, axis=1) for part in (k, v))
    scores = jnp.einsum("bqhe,bhse->bqhs", q, k) / WIDTH**0.5
    visible = jnp.ones((ROWS, q.shape[1], 1, k.shape[2]), bool)
    if valid is not None:
        visible &= valid[:, None, None]
    if causal:
        visible &= (jnp.arange(k.shape[2])[None] <= jnp.arange(q.shape[1])[:, None])[None, :, None]
    scores = jnp.where(visible, scores, -jnp.inf)
    return jnp.einsum("bqhs,bhse->bqhe", jax.nn.softmax(scores), v), jax.nn.logsumexp(scores, axis=-1)


@pytest.mark.parametrize(
    ("masked", "causal"),
    [
        (False, False),
        (True, True),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("score_bytes", [1, 2**28])  # in chunks of 16 queries, or at once
def test_plain_attention_equals_the_formula(monkeypatch, causal, masked, score_bytes):
    monkeypatch.setattr(attention, "SCORE_BYTES", score_bytes)
    q, k, v = random_qkv()
    valid = jnp.arange(KEYS)[None] < jnp.array([[KEYS - 9], [33]]) if masked else None
    for ours, theirs in zip(attend(q, k, v, valid, causal), reference_attention(q, k, v, valid, causal)):
        np.testing.assert_allclose(ours, theirs, atol=2e-6)

    def loss(run):
        return lambda *qkv: sum(jnp.sum(jnp.sin(part)) for part in run(*qkv, valid, causal))

    for ours, theirs in zip(
        *(jax.grad(loss(run), argnums=(0, 1, 2))(q, k, v) for run in (attend, reference_attention))
    ):
        np.testing.assert_allclose(ours, theirs, atol=2e-5)


def test_parts_merge_into_one_softmax():
    q, k, v = random_qkv()
    parts = [attend(q, k[:, :, part], v[:, :, part]) for part in (slice(0, 31), slice(31, 32), slice(32, None))]
    nothing = attend(q, k, v, jnp.zeros((ROWS, KEYS), bool))  # has zero weight and is finite
    assert np.isfinite(nothing[0]).all()
    np.testing.assert_allclose(merge([*parts, nothing]), reference_attention(q, k, v)[0], atol=2e-6)


GROUP, CAPTION = 3, 23


def sequences(rows=ROWS, clip=KEYS, heads=HEADS, kv_heads=KV_HEADS, width=WIDTH):
    """A clip's queries, keys and values, those of its captions, and which of the clip's tokens are valid."""
    keys = jax.random.split(jax.random.key(1), 6)
    q = jax.random.normal(keys[0], (rows, clip, heads, width))
    kv = KV(*(jax.random.normal(key, (rows, kv_heads, clip, width)) for key in keys[1:3]))
    caption_q = jax.random.normal(keys[3], (rows, GROUP, CAPTION, heads, width))
    caption_kv = KV(*(jax.random.normal(key, (rows, GROUP, kv_heads, CAPTION, width)) for key in keys[4:]))
    return (
        q,
        kv,
        caption_q,
        caption_kv,
        jnp.arange(clip)[None] < jnp.linspace(clip, clip // 2, rows).astype(int)[:, None],
    )


def outputs(module, **options):
    """All three functions of a module as one; outputs at padding are excluded."""

    def run(q, kv, caption_q, caption_kv, valid):
        visible = valid[..., None, None]
        k, v = (jnp.repeat(part, q.shape[2] // part.shape[1], axis=1).swapaxes(1, 2) for part in kv)
        return (
            jnp.where(visible, module.attend_clip(q, kv, **options), 0),
            module.attend_captions(caption_q, caption_kv, kv, valid, **options),
            jnp.where(visible, module.attend_block(q, k, v, valid, **options), 0),
        )

    return run


KERNELS = {"splash": dict(interpret=True, blocks=SplashBlocks(128, 128, 128, 128)), "cudnn": dict(implementation="xla")}


@pytest.mark.parametrize("kernel", ["splash", pytest.param("cudnn", marks=pytest.mark.slow)])
@pytest.mark.parametrize("clip", [KEYS, pytest.param(131, marks=pytest.mark.slow)])  # one block and two; odd
def test_kernels_equal_plain_attention(kernel, clip):
    """Forward pass and gradients. The GPU kernel needs a GPU: here its arguments go to the same function in XLA."""
    args = sequences(clip=clip)
    ours, theirs = outputs({"splash": splash, "cudnn": cudnn}[kernel], **KERNELS[kernel]), outputs(attention)
    for one, other in zip(jax.jit(ours)(*args), jax.jit(theirs)(*args)):
        np.testing.assert_allclose(one, other, atol=5e-6)

    def loss(run):
        return lambda *parts: sum(jnp.sum(jnp.sin(part)) for part in run(*parts, args[-1]))

    gradients = (jax.jit(jax.grad(loss(run), argnums=(0, 1, 2, 3)))(*args[:-1]) for run in (ours, theirs))
    for one, other in zip(*map(jax.tree.leaves, gradients)):
        np.testing.assert_allclose(one, other, atol=5e-5)


MESHES = """
import sys
sys.path.insert(0, "tests/models")
import jax, jax.numpy as jnp, numpy as np
from avocado_jax.errors import InputError
from avocado_jax.models.attention import plain, splash
from avocado_jax.parallel.mesh import make_mesh
from test_attention import outputs, sequences

def gradients(run, args):
    loss = lambda *parts: sum(jnp.sum(jnp.sin(part)) for part in run(*parts, args[-1]))
    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))(*args[:-1])

ours = outputs(splash, interpret=True)
for sizes, rows, kv_heads in (((2, 2, 2), 4, 2), ((1, 2, 4), 2, 2), ((8, 1, 1), 3, 4)):
    args = sequences(rows=rows, kv_heads=kv_heads)
    expected = gradients(outputs(plain), args)
    with jax.set_mesh(make_mesh(*sizes)):
        found = gradients(ours, args)
    for one, other in zip(*map(jax.tree.leaves, (found, expected))):
        np.testing.assert_allclose(one, other, atol=5e-5)
try:
    with jax.set_mesh(make_mesh(1, 1, 8)):
        ours(*sequences())
except InputError as error:
    assert "mesh.tensor 8 does not divide 4 query heads" in str(error)
    print("all good")
"""


@pytest.mark.slow
def test_splash_is_sharded_over_a_mesh():
    """Rows and heads sharded; more head shards than key heads; a batch too small for the mesh."""
    flags = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    done = subprocess.run([sys.executable, "-c", MESHES], env=flags, capture_output=True, text=True, check=False)
    assert "all good" in done.stdout, done.stderr


def test_auto_selects_attention_by_platform(monkeypatch):
    for platform, dtype, module in (
        ("cpu", "float32", attention),
        ("tpu", "float32", splash),
        ("gpu", "bfloat16", cudnn),
        ("gpu", "float32", attention),
    ):
        monkeypatch.setattr(jax, "default_backend", lambda platform=platform: platform)
        chosen = backend(Kernel("auto"), dtype).attend_clip
        assert getattr(chosen, "func", chosen) is module.attend_clip
        assert backend(Kernel("auto"), dtype, 64) is attention  # a window
        assert backend(Kernel("splash"), dtype).attend_clip.func is splash.attend_clip


@pytest.mark.parametrize(
    ("field", "size", "sizes"),
    [
        ("q", 256, ["block_q"]),
        ("kv", 128, ["block_kv"]),
        ("q_backward", 256, ["block_q_dkv", "block_q_dq"]),
        ("kv_backward", 128, ["block_kv_dkv", "block_kv_dq"]),
    ],
)
def test_block_sizes_reach_the_kernel(field, size, sizes, monkeypatch):
    """From the config, through the model. By default, 1,280 tokens are two blocks."""

    class Made(Exception):
        """The kernel's block sizes."""

    def block_sizes(**sizes):
        raise Made(sizes)

    monkeypatch.setattr(splash.splash, "BlockSizes", block_sizes)
    config = SftConfig(attention="splash", splash=replace(SplashConfig(), **{field: size}))
    model, clip = model_of(config, TINY), example(TINY, shape=(1536, 1, 1, 1))[0]
    params = jax.eval_shape(partial(init, TINY), jax.random.key(0))
    with pytest.raises(Made) as made:
        jax.eval_shape(lambda *args: Thinker(model).apply({"params": args[0]}, args[1], method="prefill"), params, clip)
    (used,) = made.value.args
    assert {name: used[name] for name in sizes} == dict.fromkeys(sizes, size)
    assert {value for name, value in used.items() if name not in sizes} == {512}


def test_block_sizes_are_multiples_of_128(tmp_path):
    (tmp_path / "config.py").write_text("from avocado_jax.config import SftConfig\nconfig = SftConfig()\n")
    with pytest.raises(InputError, match=r"splash\.kv_backward: 1000 is not a multiple of 128"):
        load(str(tmp_path / "config.py"), ["--splash.kv_backward", "1000"])

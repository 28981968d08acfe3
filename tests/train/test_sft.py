"""The SFT step: equal loss curves on every mesh, frozen parameters, skipped steps, trained parameters."""

import re
from dataclasses import replace
from functools import partial

import jax
import numpy as np
import pytest
from counted import flops_of

from avocado_jax.bench.model import random_clip
from avocado_jax.config import OptimConfig, SftConfig
from avocado_jax.models.config import SIZES, TINY
from avocado_jax.models.flops import train_flops
from avocado_jax.models.thinker import init
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.parallel.rules import RULES, path_of, shardings, spec_of
from avocado_jax.sampling.weights import decoding_weights
from avocado_jax.train.optim import optimizer
from avocado_jax.train.sft import sft_program
from avocado_jax.train.state import split, state_shapes
from avocado_jax.typing import Captions

ROWS, GROUP, LENGTH, STEPS = 8, 2, 12, 4
MODEL = replace(TINY, remat="full")
CONFIG = SftConfig(
    batch=ROWS, dtype="float32", frozen_dtype="float32", optim=OptimConfig(lr=1e-2, warmup=0.3, clip_norm=0.5)
)


@pytest.fixture(scope="module")
def batch():
    rng = np.random.default_rng(0)
    clip = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), ROWS, 0), random_clip(TINY, 100, (4, 4)))
    clip = clip._replace(
        tokens=rng.integers(0, 256, clip.tokens.shape).astype(np.int32),
        length=rng.integers(60, 100, ROWS).astype(np.int32),
    )
    assert (clip.media[:, :16] >= 0).all() and (clip.media[:, 16:] < 0).all()  # noqa: PT018
    clip.media[:, 20:60] = 16 + np.arange(40)  # sound behind the 16 tokens of the picture
    targets = rng.integers(0, 256, (ROWS, GROUP, LENGTH)).astype(np.int32)
    captions = Captions(np.roll(targets, 1, -1), targets, rng.random(targets.shape) < 0.8)
    return clip, captions, np.array([1, 1, 1, 0, 1, 1, 1, 1], np.float32), np.zeros(ROWS, np.int32)


def train_on_mesh(batch, sizes, **changes):
    """The metrics of a few steps on a mesh, and the parameters before and after."""
    mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
    with jax.set_mesh(mesh):
        shapes, step, start = sft_program(replace(CONFIG, **changes), MODEL, mesh, STEPS)
        spread = jax.tree.map(lambda leaf: leaf.sharding, shapes.params)
        params = jax.jit(partial(init, MODEL), out_shardings=spread)(jax.random.key(0))
        before = jax.device_get(params)
        state = start(params)
        placed = jax.device_put(batch, rows_sharding(mesh))
        metrics = []
        for _ in range(STEPS):
            state, values = step(state, *placed)
            metrics.append({name: float(value) for name, value in values.items()})
    return metrics, before, state


@pytest.fixture(scope="module")
def one_device_run(batch):
    return train_on_mesh(batch, (1, 1, 1))


@pytest.mark.parametrize(
    ("sizes", "accumulate"),
    [
        ((1, 4, 2), 1),
        ((1, 1, 1), 4),
        pytest.param((8, 1, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 8, 1), 1, marks=pytest.mark.slow),
        pytest.param((1, 2, 1), 4, marks=pytest.mark.slow),
    ],
)
def test_loss_curve_is_equal_on_every_mesh_and_with_microbatches(batch, one_device_run, sizes, accumulate):
    metrics, *_ = train_on_mesh(batch, sizes, accumulate=accumulate)
    losses = [line["loss"] for line in one_device_run[0]]
    assert losses[0] - losses[-1] > 0.1  # something is learned, so that curves can differ
    for one, other in zip(metrics, one_device_run[0]):
        assert one.keys() == other.keys()
        for name in one:
            assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-6), name


def test_frozen_parameters_are_bit_identical_and_have_no_moments(one_device_run):
    _, before, state = one_device_run
    (trained_before, frozen_before), (trained_after, frozen_after) = (
        split(tree, "captioner") for tree in (before, state.params)
    )
    assert {"audio", "vision"} == frozen_before.keys()
    assert "merger" not in frozen_before["vision"]
    jax.tree.map(np.testing.assert_array_equal, frozen_before, jax.device_get(frozen_after))
    moved = jax.tree.map(lambda one, other: (one != other).any(), trained_before, jax.device_get(trained_after))
    assert all(jax.tree.leaves(moved)), moved
    frozen_shapes = {leaf.shape for leaf in jax.tree.leaves(frozen_before)} - {
        leaf.shape for leaf in jax.tree.leaves(trained_before)
    }
    assert frozen_shapes
    assert not frozen_shapes & {leaf.shape for leaf in jax.tree.leaves(state.optimizer)}


def test_frozen_encoders_have_no_backward_pass():
    """The backward pass of an encoder layer would add transposed matmuls, which are counted in the traced program."""
    flops = {}
    for train in ("captioner", "all"):
        mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        model = replace(MODEL, remat="none", vision=replace(TINY.vision, layers=3))
        shapes, step, _ = sft_program(replace(CONFIG, train=train), model, mesh, STEPS)
        clip = random_clip(TINY, 1024, (4, 8))
        ids = jax.ShapeDtypeStruct((1, 1, 4), np.int32)
        captions = Captions(ids, ids, jax.ShapeDtypeStruct((1, 1, 4), bool))
        one = jax.ShapeDtypeStruct((1,), np.float32)
        flops[train] = flops_of(step.trace(shapes, clip, captions, one, one).jaxpr.jaxpr)
    shape = (1024, clip.patches.shape[1], clip.patches.shape[2], clip.mel.shape[1])
    counted = {train: train_flops(model, shape, 1, 4, train) for train in flops}
    assert flops["all"] - flops["captioner"] == pytest.approx(counted["all"] - counted["captioner"], rel=0.1)


def test_non_finite_step_changes_only_counters(batch):
    clip, captions, weight, truncated = batch
    poison = clip._replace(mel=np.full_like(clip.mel, np.nan))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        _, step, start = sft_program(CONFIG, MODEL, mesh, STEPS)
        state = start(jax.jit(partial(init, MODEL))(jax.random.key(0)))
        state, _ = step(state, clip, captions, weight, truncated)
        before = jax.device_get(state)
        for number in (1, 2):
            state, metrics = step(state, poison, captions, weight, truncated)
            assert (int(metrics["skipped"]), int(metrics["skipped_in_row"])) == (number, number)
        jax.tree.map(
            np.testing.assert_array_equal,
            jax.device_get((state.params, state.optimizer)),
            (before.params, before.optimizer),
        )
        state, metrics = step(state, clip, captions, weight, truncated)
        assert (int(metrics["skipped"]), int(metrics["skipped_in_row"]), int(state.step)) == (2, 0, 4)
        assert np.isfinite(metrics["loss"])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scan", [True, False])
def test_every_parameter_matches_one_rule(size, scan):
    model = replace(SIZES[size], scan=scan)
    params = jax.eval_shape(partial(init, model), jax.random.key(0))
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(params)]
    assert len([spec_of(path) for path in paths]) == len(paths)
    mesh = make_mesh(1, 4, 2)
    for keys, sharding in jax.tree_util.tree_leaves_with_path(shardings(params, mesh)):
        leaf = params
        for key in keys:
            leaf = leaf[key.key]
        if size == "7b" and np.prod(leaf.shape) > 2e6:  # nothing large is on every device
            assert np.prod(sharding.shard_shape(leaf.shape)) < np.prod(leaf.shape), keys


def test_every_rule_is_used():
    params = jax.eval_shape(partial(init, SIZES["7b"]), jax.random.key(0))
    int8 = jax.eval_shape(partial(decoding_weights, dtype="bfloat16", int8=True), params)
    leaves = [*jax.tree_util.tree_leaves_with_path(params), *jax.tree_util.tree_leaves_with_path(int8)]
    paths = [path_of(keys) for keys, _ in leaves]
    unused = [rule for rule, _ in RULES if not any(re.fullmatch(rule, path) for path in paths) and "lora" not in rule]
    assert not unused


@pytest.mark.parametrize("train", ["captioner", "all", "adapters"])
def test_state_of_the_full_size_has_moments_of_trained_parameters_only(train):
    config = SftConfig(train=train)
    mesh = make_mesh(1, 4, 2)
    shapes = state_shapes(SIZES["7b"], train, config.frozen_dtype, optimizer(config.optim, 10), mesh)
    kept = sum(leaf.size for leaf in jax.tree.leaves(split(shapes.params, train)[0]))
    moments = sum(leaf.size for leaf in jax.tree.leaves(shapes.optimizer))
    assert moments == pytest.approx(2 * kept, abs=10)
    frozen = jax.tree.leaves(split(shapes.params, train)[1])
    assert all(leaf.dtype == "bfloat16" for leaf in frozen)
    assert (train == "all") == (not frozen)
    whole = [leaf for leaf in jax.tree.leaves(shapes) if leaf.size > 2e6 and leaf.sharding.is_fully_replicated]
    assert not whole

"""GRPO gradients: a group row equals separate rows and costs a fifth of them."""

from dataclasses import replace
from functools import cache, partial

import jax
import numpy as np
import pytest
from counted import flops_of
from grpo_phases import CONFIG, COOL, MODEL, STOPS, B, C, G, clips, encoded_clip, random_params

from avocado_jax.config import GrpoConfig, ObjectiveConfig, SamplingConfig
from avocado_jax.models.config import SEVEN_B
from avocado_jax.models.flops import row_flops, train_flops
from avocado_jax.models.thinker import example
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.grpo import Experience, Scored, batch_gradient, caption_logprobs, grpo_program
from avocado_jax.train.objective import advantages
from avocado_jax.train.rollout import Rollout, crop, smallest_width
from avocado_jax.train.sft import model_of
from avocado_jax.typing import Captions

SHAPE = (16384, 32, 40, 16)  # a clip of 30 s: tokens, temporal patches, windows, chunks


def experience(rows=B, seed=0):
    """Ragged captions (one stops at its first token, one is masked), one row of zero weight, equal rewards."""
    rng = np.random.default_rng(seed)
    clip = clips(rows)
    targets = rng.integers(0, 250, (rows, G, C)).astype(np.int32)
    lengths = rng.integers(1, C + 1, (rows, G)).astype(np.int32)
    lengths[0, :3] = 1, 0, C
    inputs = np.concatenate([np.broadcast_to(clip.first[:, None, None], (rows, G, 1)), targets[..., :-1]], -1)
    valid = np.arange(C) < lengths[..., None]
    old, reference, sampled = (-rng.exponential(5, targets.shape).astype(np.float32) for _ in range(3))
    rewards = rng.random((rows, G)).astype(np.float32)
    rewards[1] = 0.3
    weight = np.ones(rows, np.float32)
    weight[2] = 0
    rollout = Rollout(Captions(inputs, targets, valid), sampled, lengths, lengths == C)
    advantage = np.asarray(advantages(rewards, CONFIG.objective))
    return Experience(clip, None, rollout, Scored(old, reference), advantage, weight)


def separate(batch):
    """The same batch with one row per caption: clips are repeated."""

    def repeated(leaf):
        return np.repeat(np.asarray(leaf), G, 0)

    def each_alone(leaf):
        return np.asarray(leaf).reshape(-1, 1, *leaf.shape[2:])

    return Experience(
        jax.tree.map(repeated, batch.clip),
        jax.tree.map(repeated, batch.encoded),
        jax.tree.map(each_alone, batch.rollout),
        jax.tree.map(each_alone, batch.scored),
        each_alone(batch.advantage),
        repeated(batch.weight),
    )


@cache
def gradient_of(config):
    return jax.jit(partial(batch_gradient, model=MODEL, config=config))


def gradients_of(params, batch, config, devices=8):
    mesh = make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return gradient_of(config)(params, jax.device_put(batch, rows_sharding(mesh)))


def assert_close(one, other, tolerance=1e-5):
    for a, b in zip(*map(jax.tree.leaves, (one, other)), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1, np.abs(b).max()))


OBJECTIVES = {
    "grpo": ObjectiveConfig(beta=0.04),
    "dapo": ObjectiveConfig(aggregate="token", clip_high=0.28, mask_overlong=True, importance_cap=2.0, beta=0.0),
    "gspo": ObjectiveConfig(ratio="sequence", aggregate="constant", kl="k2"),
}


@pytest.mark.parametrize(
    ("name", "encoded"),
    [
        ("dapo", True),
        pytest.param("grpo", False, marks=pytest.mark.slow),
        pytest.param("gspo", True, marks=pytest.mark.slow),
    ],
)
def test_group_row_equals_separate_rows(name, encoded):
    """Loss, gradient and sums over 8 devices, also with microbatches."""
    params, batch = random_params(MODEL), experience()
    if encoded:
        batch = batch._replace(encoded=encoded_clip(params, batch.clip))
    config = replace(CONFIG, objective=OBJECTIVES[name], sampling=COOL)
    new = caption_logprobs(MODEL, params, batch.clip, batch.encoded, batch.rollout.captions, COOL.temperature).logprob
    noise = np.random.default_rng(3).normal(size=(2, *new.shape)).astype(np.float32)
    near = [np.asarray(new) + 0.2 * part for part in noise]  # ratios on both sides of the bounds
    batch = batch._replace(scored=Scored(*near), rollout=batch.rollout._replace(sampled=near[0] + 0.1 * noise[1]))
    grads, loss, totals = gradients_of(params, batch, config)
    assert 0 < float(totals.objective.clipped_low) < float(totals.objective.tokens)
    valid = batch.rollout.captions.valid & (batch.weight > 0)[:, None, None]
    if config.objective.mask_overlong:
        valid = valid & ~batch.rollout.truncated[..., None]
    moved = np.where(valid, 0.2 * noise[0], 0)  # from `old`, if the trainer computes at the sampling temperature
    assert float(totals.objective.moved) == pytest.approx(np.sum(np.exp(moved) - moved - 1), rel=1e-3)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    expected = gradients_of(params, separate(batch), config)
    assert_close((grads, loss, totals), expected)
    if name != "dapo":
        assert_close(gradients_of(params, batch, replace(config, accumulate=2), devices=4), expected)


def test_equal_rewards_and_empty_captions_give_zero_gradients():
    """With equal rewards the policy term has zero gradient; with empty captions nothing is NaN."""
    params, batch, config = random_params(MODEL), experience(), replace(CONFIG, objective=OBJECTIVES["dapo"])
    batch = batch._replace(encoded=encoded_clip(params, batch.clip))
    equal = np.asarray(advantages(np.full((B, G), 0.3, np.float32), config.objective))
    captions = batch.rollout.captions._replace(valid=np.zeros((B, G, C), bool))
    empty = batch._replace(rollout=batch.rollout._replace(captions=captions))
    for case in (batch._replace(advantage=equal), empty):
        grads, loss, _ = gradients_of(params, case, config)
        assert float(loss) == 0
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_narrower_rollout_has_the_same_gradient(name):
    """Columns without tokens are not computed; weights that depend on the limit are unchanged."""
    config, params, batch = replace(CONFIG, objective=OBJECTIVES[name]), random_params(MODEL), experience()
    lengths = np.minimum(batch.rollout.lengths, C // 2)
    captions = batch.rollout.captions._replace(valid=np.arange(C) < lengths[..., None])
    rollout = batch.rollout._replace(captions=captions, lengths=lengths)
    scored = Scored(*(part[..., : C // 2] for part in batch.scored))
    narrow = batch._replace(rollout=crop(rollout, smallest_width(C // 2, C)), scored=scored)
    assert narrow.rollout.captions.targets.shape[-1] == C // 2
    assert_close(gradients_of(params, narrow, config), gradients_of(params, batch._replace(rollout=rollout), config))


def update_flops(rows, group, attention):
    """FLOPs of the traced update at full size, including recomputation; captions of 640 tokens."""
    config = GrpoConfig(batch=rows, group=group, attention=attention, sampling=SamplingConfig(tokens=640))
    model, mesh = model_of(config, SEVEN_B), make_mesh(1, 1, 1, devices=jax.devices()[:1])
    with jax.set_mesh(mesh):
        program = grpo_program(config, model, mesh, 10, STOPS)
        clip, captions = example(model, rows, group, SHAPE, 640)
        encoded = jax.eval_shape(program.encode, program.state.params, clip)
        scored = jax.eval_shape(program.score, program.state.params, program.reference, clip, encoded, captions)
        each, token, row = (
            jax.ShapeDtypeStruct(shape, np.float32) for shape in ((rows, group), (rows, group, 640), (rows,))
        )
        lengths = jax.ShapeDtypeStruct(each.shape, np.int32)
        rollout = Rollout(captions, token, lengths, jax.ShapeDtypeStruct(each.shape, bool))
        batch = Experience(clip, encoded, rollout, scored, each, row)
        return flops_of(program.update.trace(program.state, batch).jaxpr.jaxpr), model


@pytest.mark.parametrize("attention", ["plain", pytest.param("splash", marks=pytest.mark.slow)])
def test_group_row_costs_a_fifth_of_separate_rows(attention):
    """For the 7B and 8 captions, counted from the traced program and close to the counts from shapes."""
    together, model = update_flops(1, 8, attention)
    separate_rows, _ = update_flops(8, 1, attention)
    print(f"{together / 1e12:.1f} TFLOP against {separate_rows / 1e12:.1f}: {separate_rows / together:.2f} times")
    assert together <= separate_rows / 5
    row = row_flops(model, SHAPE, 8, 640)
    # As SFT's step without the encoders. Plain attention computes the masked half of the clip too: forward, again, and
    # twice backward; the kernel once more, since its backward pass begins with the scores.
    half = model.text.layers * 4 * model.text.heads * model.text.head * SHAPE[0] ** 2 / 2
    expected = train_flops(model, SHAPE, 8, 640, recomputed=True) - row.towers - row.entry + row.logits + 4 * half
    assert together == pytest.approx(expected, rel=0.03 if attention == "plain" else 0.12)

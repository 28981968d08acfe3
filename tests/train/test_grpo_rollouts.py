"""GRPO rollouts: policy and reference have separate adapters, sampler and trainer agree, widths and batches."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict
from grpo_phases import CONFIG, COOL, MODEL, STOPS, B, C, G, Run

from avocado_jax.config import LoraConfig, MeshConfig, ObjectiveConfig
from avocado_jax.errors import InputError
from avocado_jax.models.thinker import Encoded
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.sampling.generate import generate
from avocado_jax.train import rollout as rollout_module
from avocado_jax.train import run_grpo
from avocado_jax.train.grpo import grpo_program
from avocado_jax.train.objective import advantages
from avocado_jax.train.rollout import rows_per_clip, smallest_width

TWICE = replace(CONFIG, passes=2, minibatches=2)


@pytest.mark.parametrize("train", ["captioner", pytest.param("lora", marks=pytest.mark.slow)])
def test_reference_has_separate_adapters(train):
    """Perturbed adapters of the policy change its log-probabilities, but not those of the reference."""
    run = Run(replace(TWICE, train=train, lora=LoraConfig(4, 4.0), sampling=COOL))
    encoded, rollout = run.rollout()
    before = run.score(encoded, rollout)
    valid = np.asarray(rollout.captions.valid)
    np.testing.assert_allclose(before.old, before.reference, atol=1e-4)  # the first policy is the reference
    np.testing.assert_allclose(np.where(valid, before.old, 0), rollout.sampled, atol=1e-4)  # the sampler is the policy
    flat = flatten_dict(run.state.params)
    adapters = [path for path in flat if "merger" in path or "proj" in path]
    assert len(adapters) == 7
    for path in adapters:
        one = dict(flat)
        one[path] = one[path] + jax.random.normal(jax.random.key(0), one[path].shape)
        after = run.score(encoded, rollout, run.state._replace(params=unflatten_dict(one)))
        np.testing.assert_array_equal(after.reference, before.reference)
        assert np.abs(np.asarray(after.old) - before.old)[valid].max() > 1e-5, path
    stored = flatten_dict(run.program.reference, sep="/")
    assert ("head" in stored) == (train == "captioner")  # under adapters the base is shared
    assert not any("lora" in path for path in stored)


@pytest.mark.parametrize(
    ("sizes", "train"),
    [
        pytest.param((1, 1, 1), "captioner", marks=pytest.mark.slow),
        pytest.param((1, 4, 2), "captioner", marks=pytest.mark.slow),
        pytest.param((1, 1, 1), "lora", marks=pytest.mark.slow),
        pytest.param((1, 1, 1), "all", marks=pytest.mark.slow),
        pytest.param((4, 1, 1), "captioner", marks=pytest.mark.slow),
    ],
)
def test_sampler_equals_trainer_and_rewarded_captions_become_likelier(sizes, train):
    run = Run(replace(TWICE, train=train, lora=LoraConfig(4, 4.0)), sizes)
    if train == "lora":  # adapters that have learned something
        flat = flatten_dict(run.state.params)
        for number, path in enumerate(path for path in flat if path[-1] == "lora_b"):
            flat[path] = 0.3 * jax.random.normal(jax.random.key(number), flat[path].shape)
        run.state = run.state._replace(params=unflatten_dict(flat))
    encoded, rollout = run.rollout()
    assert (encoded is None) == (train == "all")
    scored = run.score(encoded, rollout)
    valid = np.asarray(rollout.captions.valid)
    gap = np.abs(np.asarray(scored.old) - rollout.sampled)[valid].max()
    assert gap < 1e-4
    assert (np.asarray(rollout.sampled)[~valid] == 0).all()
    rewards = np.random.default_rng(0).random((B, G)).astype(np.float32)
    metrics = run.update(encoded, rollout, scored, rewards)
    assert metrics["sampler_gap"] <= gap
    assert metrics["skipped"] == 0
    assert int(run.state.step) == 1
    assert metrics["tokens"] == np.asarray(rollout.lengths).sum()
    after = run.score(encoded, rollout)
    change = np.where(valid, np.asarray(after.old) - scored.old, 0).sum(-1)
    better = np.asarray(advantages(rewards, CONFIG.objective)) > 0
    assert change[better].mean() > change[~better].mean() + 1e-3
    np.testing.assert_array_equal(after.reference, scored.reference)


@pytest.mark.slow
def test_rollouts_depend_only_on_seed_and_step():
    run = Run(CONFIG)
    _, first = run.rollout(0)
    _, again = run.rollout(0)
    _, other = run.rollout(1)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    assert (np.asarray(other.captions.targets) != first.captions.targets).any()
    parts = Run(replace(CONFIG, accumulate=2))
    np.testing.assert_array_equal(parts.rollout(0)[1].captions.targets, first.captions.targets)
    split = Run(replace(CONFIG, batch=B // 2, split=2))  # the same clips, two rows each
    split.clip = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf)[: B // 2], 2, 0), run.clip)
    spread = split.rollout(0)[1].captions.targets
    np.testing.assert_array_equal(spread.reshape(B // 2, G, C), first.captions.targets[: B // 2])
    lengths, targets = np.asarray(first.lengths), np.asarray(first.captions.targets)
    for index in np.ndindex(B, G):
        stopped = targets[index][lengths[index] - 1] in STOPS
        assert stopped != bool(first.truncated[index])
        assert first.captions.inputs[index][0] == run.clip.first[index[0]]


@pytest.mark.parametrize(
    ("sizes", "tensor", "split", "rows"),
    [((1, 4, 1), 2, 2, 8), pytest.param((4, 1, 2), 0, 1, 16, marks=pytest.mark.slow), ((1, 2, 2), 4, 4, 8)],
)
def test_captions_depend_on_neither_batches_nor_meshes_nor_rows(monkeypatch, sizes, tensor, split, rows):
    """Two batches that are sampled together, on the mesh of `rollout_tensor`: each clip has its captions of a rollout
    on one device. A clip is as few rows as give each shard equally many."""
    sampled = []

    def record(*args, **options):
        sampled.append((args[2].shape, jax.sharding.get_abstract_mesh().shape["tensor"]))
        return generate(*args, **options)

    monkeypatch.setattr(rollout_module, "generate", record)
    clips = B if split == 1 else B // 2
    capped = replace(CONFIG, rollout_batches=2, objective=ObjectiveConfig(importance_cap=2.0))
    run = Run(replace(capped, batch=clips, split=split, mesh=MeshConfig(rollout_tensor=tensor)), sizes)
    one = Run(replace(CONFIG, batch=clips))
    other = jax.tree.map(lambda leaf: leaf[::-1], one.clip)

    def roll_out(run, batches, step):
        with jax.set_mesh(run.mesh):
            encoded = tuple(run.program.encode(run.state.params, clip) for clip in batches)
            view = run.program.view(run.state.params)
            return run.program.roll_out(view, batches, encoded, jnp.int32(step), run.banned)

    def by_rows(clip):
        repeated = jax.tree.map(lambda leaf: np.repeat(leaf, split, 0), clip)
        return jax.device_put(repeated, rows_sharding(run.mesh))

    together = roll_out(run, (by_rows(one.clip), by_rows(other)), 3)
    assert sampled == [((rows, 2 * clips * G // rows), tensor or sizes[2])]
    view = run.program.view(run.state.params)["text"]["layers_0"]["q"]["kernel"]
    assert view.sharding.shard_shape(view.shape)[1] == view.shape[1] // (tensor or sizes[2])
    for rollout, clip, step in zip(together, (one.clip, other), (3, 4)):
        assert rollout.lengths.sharding.is_equivalent_to(rows_sharding(run.mesh), 2)
        (expected,) = roll_out(one, (clip,), step)
        assert rollout.lengths.shape == (clips * split, G // split)
        rollout = jax.tree.map(lambda leaf: np.asarray(leaf).reshape(clips, G, *leaf.shape[2:]), rollout)
        np.testing.assert_array_equal(rollout.captions.targets, expected.captions.targets)
        np.testing.assert_array_equal(rollout.captions.inputs, expected.captions.inputs)
        np.testing.assert_array_equal(rollout.lengths, expected.lengths)
        np.testing.assert_allclose(rollout.sampled, expected.sampled, atol=1e-4)
    assert (together[0].captions.targets != together[1].captions.targets).any()


def test_rollout_batches_are_validated():
    capped = replace(CONFIG, rollout_batches=2, objective=ObjectiveConfig(importance_cap=2.0))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for config, why in (
        (replace(capped, objective=ObjectiveConfig()), "needs objective.importance_cap"),
        (replace(capped, steps=5), "rollout_batches: 2 does not divide 5 steps"),
        (replace(capped, rollout_batches=0), "rollout_batches: 0"),
        (replace(CONFIG, rollout_int8=True), "rollout_int8: .* needs objective.importance_cap"),
        (replace(CONFIG, mesh=MeshConfig(rollout_tensor=2)), "mesh.rollout_tensor: 2 is not a multiple of tensor"),
    ):
        with pytest.raises(InputError, match=why):
            grpo_program(config, MODEL, mesh, 4, STOPS)


def test_invalid_fields_are_reported_before_the_checkpoint_is_read(monkeypatch, tmp_path):
    def set_up(*_):
        raise AssertionError("the checkpoint was opened")

    monkeypatch.setattr(run_grpo, "ready", lambda config, folder, opened: opened())
    monkeypatch.setattr(run_grpo, "set_up", set_up)
    with pytest.raises(InputError, match="rollout_int8"):
        run_grpo.grpo(replace(CONFIG, rollout_int8=True), str(tmp_path))


def test_a_clip_is_as_few_rows_as_fill_the_shards():
    assert rows_per_clip(32, 2, 16) == 1  # four batches of 8 clips
    assert rows_per_clip(8, 2, 16) == 2
    assert rows_per_clip(8, 8, 32) == 4
    assert rows_per_clip(8, 2, 32) == 2  # not divided: as in the batch
    assert rows_per_clip(8, 1, 8) == 1


@pytest.mark.slow
def test_single_update_uses_the_policys_probabilities_as_old():
    run = Run(CONFIG)
    encoded, rollout = run.rollout()
    scored = run.score(encoded, rollout)
    assert scored.old is None
    metrics = run.update(encoded, rollout, scored, np.random.default_rng(0).random((B, G)).astype(np.float32))
    assert metrics["ratio"] == 1
    assert metrics["moved"] == metrics["clipped_low"] == metrics["clipped_high"] == 0
    assert metrics["sampler_gap"] < 1e-4
    assert metrics["kl"] < 1e-9


@pytest.mark.slow
def test_non_finite_update_changes_nothing():
    run = Run(CONFIG)
    encoded, rollout = run.rollout()
    scored = run.score(encoded, rollout)
    before = jax.device_get(run.state)
    poison = Encoded(encoded.vision, encoded.audio * jnp.nan)
    metrics = run.update(poison, rollout, scored, np.random.default_rng(0).random((B, G)).astype(np.float32))
    assert (metrics["skipped"], metrics["skipped_in_row"]) == (1, 1)
    for one, other in zip(*map(jax.tree.leaves, ((run.state.params, run.state.optimizer), before[1:3])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_captions_are_truncated_to_the_smallest_width_that_fits():
    wide = {0: 2048, 1024: 2048, 2048: 2048, 2049: 4096, 4096: 4096}
    assert {longest: smallest_width(longest, 4096) for longest in wide} == wide
    assert [smallest_width(longest, 5) for longest in (1, 3, 4, 5)] == [3, 3, 5, 5]
    assert [smallest_width(longest, 1) for longest in (0, 1)] == [1, 1]


def test_indivisible_batch_is_refused():
    with pytest.raises(InputError, match="batch: 6 clips"):
        Run(replace(CONFIG, batch=6), (1, 4, 1))

"""GRPO's phases: a group row equals separate rows, each policy has its own adapters, sampler and trainer agree."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from counted import flops_of
from flax.traverse_util import flatten_dict, unflatten_dict

from avocado_jax.bench.model import random_clip
from avocado_jax.config import GrpoConfig, LoraConfig, ObjectiveConfig, OptimConfig, SamplingConfig
from avocado_jax.errors import InputError
from avocado_jax.models.config import SEVEN_B, TINY
from avocado_jax.models.flops import row_flops, train_flops
from avocado_jax.models.thinker import Encoded, Thinker, example, init
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.grpo import Experience, Scored, batch_gradient, caption_logprobs, grpo_program
from avocado_jax.train.objective import advantages
from avocado_jax.train.rollout import Rollout, cut, fitting
from avocado_jax.train.sft import model_of
from avocado_jax.typing import Captions

B, G, C = 8, 4, 12
STOPS = (258,)
SHAPE = (16384, 32, 40, 16)  # a clip of 30 s: tokens, temporal patches, windows, chunks
CONFIG = GrpoConfig(
    batch=B,
    group=G,
    dtype="float32",
    frozen_dtype="float32",
    reference_dtype="float32",
    remat="none",
    sampling=SamplingConfig(tokens=C),
    optim=OptimConfig(lr=1e-3, warmup=0.0),
)
COOL = SamplingConfig(tokens=C, temperature=0.7)
MODEL = model_of(CONFIG, TINY)


def clips(rows):
    """Ragged clips with picture and sound."""
    rng = np.random.default_rng(0)
    clip = jax.tree.map(lambda leaf: np.repeat(np.asarray(leaf), rows, 0), random_clip(TINY, 100, (4, 4)))
    clip.media[:, 20:60] = 16 + np.arange(40)  # sound behind the 16 tokens of the picture
    return clip._replace(
        tokens=rng.integers(0, 256, clip.tokens.shape).astype(np.int32),
        length=rng.integers(60, 100, rows).astype(np.int32),
        patches=rng.integers(0, 256, clip.patches.shape).astype(np.uint8),
        mel=rng.normal(size=clip.mel.shape).astype(np.float32),
    )


def random_params(model, key=0):
    """Parameters with O(1) logits, so that captions differ."""
    params = jax.jit(partial(init, model))(jax.random.key(key))
    return params | {"embedding": params["embedding"] * 50, "head": params["head"] * 20}


def experience(rows=B, seed=0):
    """Ragged captions (one stops at its first token, one counts for nothing), one row of no weight, equal rewards."""
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
    """The same with a row for each caption: its clip is repeated."""

    def repeated(leaf):
        return np.repeat(np.asarray(leaf), G, 0)

    def apart(leaf):
        return np.asarray(leaf).reshape(-1, 1, *leaf.shape[2:])

    return Experience(
        jax.tree.map(repeated, batch.clip),
        jax.tree.map(repeated, batch.encoded),
        jax.tree.map(apart, batch.rollout),
        jax.tree.map(apart, batch.scored),
        apart(batch.advantage),
        repeated(batch.weight),
    )


def encoded_clip(params, clip):
    return jax.jit(partial(Thinker(MODEL).apply, method="encode"))({"params": params}, clip)


@cache
def gradient_of(config):
    return jax.jit(partial(batch_gradient, model=MODEL, config=config))


def gradients_of(params, batch, config, devices=8):
    mesh = make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    with jax.set_mesh(mesh):
        return gradient_of(config)(params, jax.device_put(batch, rows_sharding(mesh)))


def same(one, other, tolerance=1e-5):
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
def test_a_group_row_equals_separate_rows(name, encoded):
    """Loss, gradient and sums, over 8 devices; in parts too."""
    params, batch = random_params(MODEL), experience()
    if encoded:
        batch = batch._replace(encoded=encoded_clip(params, batch.clip))
    config = replace(CONFIG, objective=OBJECTIVES[name], sampling=COOL)
    new = caption_logprobs(MODEL, params, batch.clip, batch.encoded, batch.rollout.captions, COOL.temperature).logprob
    noise = np.random.default_rng(3).normal(size=(2, *new.shape)).astype(np.float32)
    near = [np.asarray(new) + 0.2 * part for part in noise]  # ratios on both sides of the bounds
    batch = batch._replace(scored=Scored(*near), rollout=batch.rollout._replace(sampled=near[0] + 0.1 * noise[1]))
    grads, loss, sums = gradients_of(params, batch, config)
    assert 0 < float(sums.objective.clipped_low) < float(sums.objective.tokens)
    valid = batch.rollout.captions.valid & (batch.weight > 0)[:, None, None]
    if config.objective.mask_overlong:
        valid = valid & ~batch.rollout.truncated[..., None]
    moved = np.where(valid, 0.2 * noise[0], 0)  # from `old`, if the trainer computes at the sampling temperature
    assert float(sums.objective.moved) == pytest.approx(np.sum(np.exp(moved) - moved - 1), rel=1e-3)
    assert all(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(grads))
    expected = gradients_of(params, separate(batch), config)
    same((grads, loss, sums), expected)
    if name != "dapo":
        same(gradients_of(params, batch, replace(config, accumulate=2), devices=4), expected)


def test_equal_rewards_and_empty_captions():
    """Without rewards that differ the policy's term has no gradient at all; without tokens nothing is NaN."""
    params, batch, config = random_params(MODEL), experience(), replace(CONFIG, objective=OBJECTIVES["dapo"])
    batch = batch._replace(encoded=encoded_clip(params, batch.clip))
    equal = np.asarray(advantages(np.full((B, G), 0.3, np.float32), config.objective))
    captions = batch.rollout.captions._replace(valid=np.zeros((B, G, C), bool))
    empty = batch._replace(rollout=batch.rollout._replace(captions=captions))
    for case in (batch._replace(advantage=equal), empty):
        grads, loss, _ = gradients_of(params, case, config)
        assert float(loss) == 0
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(grads))


@cache
def program_of(config, model, mesh):
    return grpo_program(config, model, mesh, 10, STOPS)


class Run:
    """The phases of a config on a mesh, from one set of parameters."""

    def __init__(self, config, sizes=(1, 1, 1), held=TINY):
        self.config, self.model = config, model_of(config, held)
        self.mesh = make_mesh(*sizes, devices=jax.devices()[: int(np.prod(sizes))])
        with jax.set_mesh(self.mesh):
            self.program = program = program_of(config, self.model, self.mesh)
            spread = jax.tree.map(lambda leaf: leaf.sharding, program.state.params)
            params = jax.device_put(random_params(self.model), spread)
            shapes = flatten_dict(program.reference)
            flat = flatten_dict(params)
            self.reference = unflatten_dict({path: jnp.copy(flat[path]) for path in shapes})
            self.state = program.begin(params)
            self.clip = jax.device_put(clips(config.batch), rows_sharding(self.mesh))
        self.banned = jnp.arange(TINY.text.vocab) >= 259

    def rollout(self, step=0, state=None):
        state = state or self.state
        with jax.set_mesh(self.mesh):
            encoded = self.program.encode and self.program.encode(state.params, self.clip)
            view = self.program.view(state.params)
            (rollout,) = self.program.roll_out(view, (self.clip,), (encoded,), jnp.int32(step), self.banned)
            return encoded, rollout

    def score(self, encoded, rollout, state=None):
        state = state or self.state
        with jax.set_mesh(self.mesh):
            return self.program.score(state.params, self.reference, self.clip, encoded, rollout.captions)

    def update(self, encoded, rollout, scored, rewards):
        weight = np.ones(self.config.batch, np.float32)
        with jax.set_mesh(self.mesh):
            rows = jax.device_put(
                (np.asarray(advantages(rewards, self.config.objective)), weight), rows_sharding(self.mesh)
            )
            batch = Experience(self.clip, encoded, rollout, scored, *rows)
            self.state, metrics = self.program.update(self.state, batch)
        return {name: float(value) for name, value in metrics.items()}


TWICE = replace(CONFIG, passes=2, minibatches=2)


@pytest.mark.parametrize("train", ["captioner", pytest.param("lora", marks=pytest.mark.slow)])
def test_the_reference_has_its_own_adapters(train):
    """Perturbed adapters of the policy change its log-probabilities, and no bit of the reference's."""
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
    held = flatten_dict(run.program.reference, sep="/")
    assert ("head" in held) == (train == "captioner")  # under adapters the base is shared
    assert not any("lora" in path for path in held)


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
def test_sampler_and_trainer_agree_and_rewarded_captions_become_likelier(sizes, train):
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
    told = run.update(encoded, rollout, scored, rewards)
    assert told["sampler_gap"] <= gap
    assert told["skipped"] == 0
    assert int(run.state.step) == 1
    assert told["tokens"] == np.asarray(rollout.lengths).sum()
    after = run.score(encoded, rollout)
    change = np.where(valid, np.asarray(after.old) - scored.old, 0).sum(-1)
    better = np.asarray(advantages(rewards, CONFIG.objective)) > 0
    assert change[better].mean() > change[~better].mean() + 1e-3
    np.testing.assert_array_equal(after.reference, scored.reference)


@pytest.mark.slow
def test_rollouts_are_those_of_seed_and_step():
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
    for place in np.ndindex(B, G):
        stopped = targets[place][lengths[place] - 1] in STOPS
        assert stopped != bool(first.truncated[place])
        assert first.captions.inputs[place][0] == run.clip.first[place[0]]


def test_batches_that_are_sampled_together_have_the_captions_of_separate_rollouts():
    """One program over the rows of both batches; each row's draws are those of its batch's step."""
    run = Run(replace(CONFIG, rollout_batches=2, objective=ObjectiveConfig(importance_cap=2.0)), (4, 1, 2))
    other = jax.tree.map(lambda leaf: leaf[::-1], run.clip)
    with jax.set_mesh(run.mesh):
        batches = run.clip, jax.device_put(other, rows_sharding(run.mesh))
        encoded = tuple(run.program.encode(run.state.params, clip) for clip in batches)
        view = run.program.view(run.state.params)
        together = run.program.roll_out(view, batches, encoded, jnp.int32(3), run.banned)
        for number, rollout in enumerate(together):
            alone = (batches[number],), (encoded[number],)
            (expected,) = run.program.roll_out(view, *alone, jnp.int32(3 + number), run.banned)
            np.testing.assert_array_equal(rollout.captions.targets, expected.captions.targets)
            np.testing.assert_array_equal(rollout.captions.inputs, expected.captions.inputs)
            np.testing.assert_array_equal(rollout.lengths, expected.lengths)
            np.testing.assert_allclose(rollout.sampled, expected.sampled, atol=1e-4)
            assert rollout.lengths.sharding.is_equivalent_to(expected.lengths.sharding, 2)
    assert (together[0].captions.targets != together[1].captions.targets).any()


def test_rollout_batches_are_checked():
    capped = replace(CONFIG, rollout_batches=2, objective=ObjectiveConfig(importance_cap=2.0))
    mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
    for config, steps, why in (
        (replace(capped, objective=ObjectiveConfig()), 4, "needs objective.importance_cap"),
        (capped, 5, "rollout_batches: 2 does not divide 5 steps"),
        (replace(capped, rollout_batches=0), 4, "rollout_batches: 0"),
    ):
        with pytest.raises(InputError, match=why):
            grpo_program(config, MODEL, mesh, steps, STOPS)


@pytest.mark.slow
def test_one_update_takes_the_policys_own_probabilities_as_old():
    run = Run(CONFIG)
    encoded, rollout = run.rollout()
    scored = run.score(encoded, rollout)
    assert scored.old is None
    told = run.update(encoded, rollout, scored, np.random.default_rng(0).random((B, G)).astype(np.float32))
    assert told["ratio"] == 1
    assert told["moved"] == told["clipped_low"] == told["clipped_high"] == 0
    assert told["sampler_gap"] < 1e-4
    assert told["kl"] < 1e-9


@pytest.mark.slow
def test_an_update_that_is_not_finite_changes_nothing():
    run = Run(CONFIG)
    encoded, rollout = run.rollout()
    scored = run.score(encoded, rollout)
    before = jax.device_get(run.state)
    poison = Encoded(encoded.vision, encoded.audio * jnp.nan)
    told = run.update(poison, rollout, scored, np.random.default_rng(0).random((B, G)).astype(np.float32))
    assert (told["skipped"], told["skipped_in_row"]) == (1, 1)
    for one, other in zip(*map(jax.tree.leaves, ((run.state.params, run.state.optimizer), before[1:3])), strict=True):
        np.testing.assert_array_equal(one, other)


def test_captions_are_cut_to_the_least_width_that_holds_them():
    wide = {0: 2048, 1024: 2048, 2048: 2048, 2049: 4096, 4096: 4096}
    assert {longest: fitting(longest, 4096) for longest in wide} == wide
    assert [fitting(longest, 5) for longest in (1, 3, 4, 5)] == [3, 3, 5, 5]
    assert [fitting(longest, 1) for longest in (0, 1)] == [1, 1]


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_narrower_rollout_has_the_same_gradient(name):
    """What a column without captions costs is saved; what captions count by the limit stays."""
    config, params, batch = replace(CONFIG, objective=OBJECTIVES[name]), random_params(MODEL), experience()
    lengths = np.minimum(batch.rollout.lengths, C // 2)
    captions = batch.rollout.captions._replace(valid=np.arange(C) < lengths[..., None])
    rollout = batch.rollout._replace(captions=captions, lengths=lengths)
    scored = Scored(*(part[..., : C // 2] for part in batch.scored))
    narrow = batch._replace(rollout=cut(rollout, fitting(C // 2, C)), scored=scored)
    assert narrow.rollout.captions.targets.shape[-1] == C // 2
    same(gradients_of(params, narrow, config), gradients_of(params, batch._replace(rollout=rollout), config))


def test_a_batch_that_is_not_divided_is_told():
    with pytest.raises(InputError, match="batch: 6 clips"):
        Run(replace(CONFIG, batch=6), (1, 4, 1))


def update_flops(rows, group, attention):
    """Operations of the traced update of the full size, what is recomputed too; captions of 640 tokens."""
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
def test_a_group_row_costs_a_fifth_of_separate_rows(attention):
    """7B, 8 captions: counted from the traced program, and near what the shapes say."""
    together, model = update_flops(1, 8, attention)
    apart, _ = update_flops(8, 1, attention)
    print(f"{together / 1e12:.1f} TFLOP against {apart / 1e12:.1f}: {apart / together:.2f} times")
    assert together <= apart / 5
    row = row_flops(model, SHAPE, 8, 640)
    # As SFT's step without the encoders. Plain attention computes the masked half of the clip too: forward, again, and
    # twice backward; the kernel once more, since its backward pass begins with the scores.
    half = model.text.layers * 4 * model.text.heads * model.text.head * SHAPE[0] ** 2 / 2
    expected = train_flops(model, SHAPE, 8, 640, recomputed=True) - row.towers - row.entry + row.logits + 4 * half
    assert together == pytest.approx(expected, rel=0.03 if attention == "plain" else 0.12)

"""Spare clips of a rollout in the steps of a run: training, logging and resumption."""

import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from avocado_jax.config import GrpoConfig, ObjectiveConfig, SamplingConfig
from avocado_jax.data.pipeline import Batch
from avocado_jax.data.plan import Plan
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train import rollout as rollouts
from avocado_jax.train import run_grpo
from avocado_jax.train.grpo import GrpoProgram, Scored
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run_grpo import blocks
from avocado_jax.train.state import State, rest_of
from avocado_jax.typing import Captions, Clip

B, G, C = 2, 2, 4
START = State(jnp.int32(0), 0, None, jnp.int32(0), jnp.int32(0))


class Positions:
    """A plan of blocks of `together` batches and one spare batch. Batch n has the records 10 n and 10 n + 1."""

    position, spare_positions, spares = Plan.position, Plan.spare_positions, 1

    def __init__(self, together):
        self.together = together

    def step(self, position):
        return SimpleNamespace(records=[10 * position, 10 * position + 1])


class Run:
    """The steps of a run whose phases record their arguments. Clips are the numbers of their records.

    Args:
        lengths: by record, of its two captions; the reward is the length. By default they differ.
    """

    def __init__(self, folder, lengths, together=2):
        objective, sampling = ObjectiveConfig(importance_cap=2.0), SamplingConfig(tokens=C)
        self.config = GrpoConfig(
            batch=B, group=G, sampling=sampling, objective=objective, rollout_batches=together, oversample=B
        )
        self.folder, self.plan = folder, Positions(together)
        self.sampled, self.scored, self.learned = [], [], []
        self.mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])

        def roll_out(view, clips, encoded, step, banned):
            self.sampled.append([int(clip[0]) // 10 for clip in clips])
            return tuple(made(clip) for clip in clips)

        def made(clip):
            sizes = jnp.array([lengths.get(int(record), (1, 2)) for record in clip])
            tokens = jnp.broadcast_to(clip[:, None, None], (B, G, C)).astype(jnp.int32)
            return Rollout(Captions(tokens, tokens, tokens > 0), tokens * 1.0, sizes, sizes > C)

        def score(params, reference, clip, encoded, captions):
            self.scored.append((clip.tolist(), captions.targets.shape[-1]))
            return Scored(None, None)

        def update(state, experience):
            captions = experience.rollout.captions.targets[:, 0, 0]
            np.testing.assert_array_equal(captions, experience.clip)
            self.learned.append((experience.clip.tolist(), experience.weight.tolist()))
            assert experience.advantage.shape == (B, G)
            return state._replace(step=state.step + 1), {"sampler_gap": jnp.float32(0)}

        program = GrpoProgram(
            sampler=None,
            sampler_mesh=None,
            **dict.fromkeys(("state", "reference", "begin", "encode")),
            view=lambda params: None,
            roll_out=roll_out,
            score=score,
            update=update,
        )
        rewards = SimpleNamespace(
            judge=lambda *_: dict,
            terms=lambda rollout, *_: {"length": rollout.lengths.astype("float32")},
            combine=lambda terms, _: (terms["length"], {}),
            check=lambda judged: None,
        )
        index = SimpleNamespace(ids={n: str(n) for n in range(100)})
        setup = SimpleNamespace(
            mesh=self.mesh,
            plan=self.plan,
            source=SimpleNamespace(index=index),
            words=SimpleNamespace(decode=lambda ids: ""),
        )
        self.step, _ = run_grpo._step(self.config, setup, program, rewards, {}, None, (), str(folder))

    def run(self, state, first, last, stop=None):
        """Run the steps of whole blocks from `first` to `last` - 1, or to `stop` - 1. Returns the state and metrics."""
        found, numbers = [], range(*map(self.plan.position, (first, last)))
        empty = Batch(**dict.fromkeys(Batch._fields))
        batches = (
            empty._replace(step=number, clip=jnp.array(self.plan.step(number).records), weight=jnp.ones(B))
            for number in numbers
        )
        with jax.set_mesh(self.mesh):
            for block in blocks(batches, first, self.plan.together, 1):
                if block.step == stop:
                    break
                state, metrics, finish = self.step(state, block)
                finish()
                found.append({name: int(metrics[name]) for name in ("replaced", "dropped", "all_equal", "rows")})
        return state, found

    def ids(self, step):
        """Ids of the groups in the lines of a step."""
        lines = map(json.loads, (self.folder / f"rollouts/{step}.jsonl").read_text().splitlines())
        return [int(line["id"]) for line in lines if line["group"] == 0]


SAME = (2, 2)


def test_spares_are_shared_by_all_batches_of_a_rollout(tmp_path):
    """In order, each once; scores and updates have them at the positions of the groups that they replace."""
    run = Run(tmp_path, {0: SAME, 11: SAME, 40: SAME, 41: SAME})
    state, found = run.run(START, 0, 4)
    assert run.sampled == [[0, 1, 2], [3, 4, 5]]
    assert run.learned == [([20, 1], [1, 1]), ([10, 21], [1, 1]), ([30, 31], [1, 1]), ([50, 51], [1, 1])]
    assert run.scored == [(clips, 2) for clips, _ in run.learned]
    assert [one["replaced"] for one in found] == [1, 1, 0, 2]
    assert all((one["dropped"], one["all_equal"], one["rows"]) == (0, 0, 2) for one in found)
    assert state.spent.tolist() == [True, True]
    # sampled captions are logged with the step; spares with the step that learned from them
    assert [run.ids(step) for step in (1, 2, 3, 4)] == [[0, 1, 20], [10, 11, 21], [30, 31], [40, 41, 50, 51]]


def test_groups_without_a_spare_have_zero_weight(tmp_path):
    run = Run(tmp_path, {0: SAME, 1: SAME, 10: SAME, 11: SAME, 20: SAME})
    _, found = run.run(START, 0, 2)
    assert run.learned == [([21, 1], [1, 0]), ([10, 11], [0, 0])]
    assert found == [
        {"replaced": 1, "dropped": 1, "all_equal": 0, "rows": 2},
        {"replaced": 0, "dropped": 2, "all_equal": 1, "rows": 2},
    ]


def test_resume_restores_used_spares(tmp_path):
    lengths = {0: SAME, 10: SAME, 11: SAME}
    undisturbed = Run(tmp_path / "all", lengths)
    final, _ = undisturbed.run(START, 0, 2)
    assert undisturbed.learned == [([20, 1], [1, 1]), ([21, 11], [1, 0])]
    stopped, _ = Run(tmp_path / "parts", lengths).run(START, 0, 2, stop=1)
    assert rest_of(stopped).keys() >= {"rollouts", "spent"}
    assert (len(stopped.rollouts), stopped.spent.tolist()) == (3, [True, False])
    again = Run(tmp_path / "parts", lengths)
    state, _ = again.run(stopped, 1, 2)
    assert not again.sampled
    assert again.learned == undisturbed.learned[1:]
    assert again.ids(2) == undisturbed.ids(2) == [10, 11, 21]
    assert state.spent.tolist() == final.spent.tolist() == [True, True]


def test_next_rollout_has_new_spares(tmp_path):
    """Also with a single batch per rollout, which stores nothing in the state."""
    run = Run(tmp_path, {0: SAME, 20: SAME, 30: (2, 4)}, together=1)
    state, _ = run.run(START, 0, 2)
    assert run.sampled == [[0, 1], [2, 3]]
    assert [clips for clips, _ in run.learned] == [[10, 1], [30, 21]]
    assert run.scored[1][1] == 4  # the captions of spares fit too
    assert state.rollouts == state.spent == ()
    assert rest_of(state).keys() == {"step", "params", "optimizer", "skipped", "in_row"}


@pytest.mark.parametrize("together", [1, 2])
def test_spares_use_separate_random_keys(together, monkeypatch):
    """They do not change the random keys of the batches."""
    received = []

    def generate(view, clip, keys, *_, **__):
        received.append(jax.random.key_data(keys).reshape(2, -1, G, 2))
        raise InterruptedError

    monkeypatch.setattr(rollouts, "generate", generate)
    clip = Clip(*[None] * len(Clip._fields))._replace(tokens=np.zeros((2, 1)))
    for step in (0, together):
        for count in (together, together + 2):
            with pytest.raises(InterruptedError):
                rollouts.roll_out(
                    None, (clip,) * count, (None,) * count, step, None,
                    model=None, sampling=SamplingConfig(), group=G, split=1, stops=(), seed=3, mesh=None,
                    together=together,
                )  # fmt: skip
    for without, with_spares in (received[:2], received[2:]):
        np.testing.assert_array_equal(with_spares[:, :together], without)
    every = np.concatenate([received[1], received[3]], axis=1).reshape(-1, 2)
    assert len(np.unique(every, axis=0)) == len(every)

"""Several batches per rollout: the order of the phases, resumption, and the judge."""

import threading
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from avocado_jax.config import GrpoConfig, ObjectiveConfig, SamplingConfig
from avocado_jax.data.pipeline import Batch
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train import run_grpo
from avocado_jax.train.grpo import GrpoProgram, Scored
from avocado_jax.train.rollout import Rollout
from avocado_jax.train.run_grpo import blocks
from avocado_jax.train.state import State, rest_of
from avocado_jax.typing import Captions

B, G, C = 2, 2, 4


def batch(step):
    return Batch(**dict.fromkeys(Batch._fields))._replace(
        step=step, clip=step, weight=jnp.ones(B), following=(), spares=()
    )


def rollout_of(step):
    """A rollout with the step in its log-probabilities."""
    tokens = jnp.ones((B, G, C), jnp.int32)
    sampled, lengths = jnp.full((B, G, C), step, jnp.float32), jnp.full((B, G), 2)
    return Rollout(Captions(tokens, tokens, tokens > 0), sampled, lengths, lengths > C)


def start():
    return State(jnp.int32(0), 0, None, jnp.int32(0), jnp.int32(0))


class Steps:
    """The step function of a run whose phases record their calls. An update adds 1 to the parameters."""

    def __init__(self, folder, answers=lambda step: None, **fields):
        capped = ObjectiveConfig(importance_cap=2.0)
        self.config = GrpoConfig(batch=B, group=G, sampling=SamplingConfig(tokens=C), objective=capped, **fields)
        self.mesh = make_mesh(1, 1, 1, devices=jax.devices()[:1])
        self.calls, self.gaps = [], {}

        def phase(name, result):
            def run(*args):
                self.calls.append((name, *args))
                return result(*args)

            return run

        def update(state, experience):
            state = state._replace(step=state.step + 1, params=state.params + 1)
            return state, {"sampler_gap": jnp.float32(self.gaps.get(int(state.step), 0))}

        program = GrpoProgram(
            sampler=None,
            sampler_mesh=None,
            state=None,
            reference=None,
            begin=None,
            encode=phase("encode", lambda params, clip: f"encoded {clip}"),
            view=phase("view", lambda params: f"view of {params}"),
            roll_out=phase("roll_out", lambda view, clips, *_: tuple(map(rollout_of, clips))),
            score=phase("score", lambda *_: Scored(None, jnp.zeros((B, G, C)))),
            update=phase("update", update),
        )
        rewards = SimpleNamespace(
            judge=phase("judge", lambda rollout, batch: lambda: answers(batch.step)),
            terms=lambda rollout, *_: {"length": rollout.lengths.astype("float32")},
            combine=lambda terms, _: (terms["length"], {}),
            check=lambda judged: None,
        )
        plan = SimpleNamespace(
            step=lambda _: SimpleNamespace(records=[-1] * B), position=lambda step: step, spare_positions=lambda _: ()
        )
        setup = SimpleNamespace(mesh=self.mesh, plan=plan)
        self.step, _ = run_grpo._step(self.config, setup, program, rewards, {}, None, (), str(folder))

    def run(self, state, first, last, stop=None, weights={}):  # noqa: B006
        """Run a job's steps from `first` to `last` - 1, or until `stop` steps are finished.

        `weights`: of the rows of some steps.

        Returns:
            The state, and (metrics, entries of "perf") of each step.
        """
        found = []
        with jax.set_mesh(self.mesh):
            batches = [batch(step) for step in range(first, last)]
            batches = [one._replace(weight=weights.get(one.step, one.weight)) for one in batches]
            for one in blocks(Batches(batches), first, self.config.rollout_batches):
                if one.step == stop:
                    break
                state, metrics, finish = self.step(state, one)
                found.append((metrics, finish()))
        return state, found

    def of(self, name):
        """Arguments of all calls of a phase."""
        return [args for called, *args in self.calls if called == name]


class Batches(list):
    """An iterator that can be closed."""

    closed = False

    def __iter__(self):
        return self

    def __next__(self):
        if not self:
            raise StopIteration
        return self.pop(0)

    def close(self):
        self.closed = True


@pytest.mark.parametrize(
    ("first", "size", "expected"),
    [
        (0, 1, [(0, []), (1, []), (2, []), (3, []), (4, []), (5, [])]),
        (0, 3, [(0, [1, 2]), (1, []), (2, []), (3, [4, 5]), (4, []), (5, [])]),
        (2, 4, [(2, [3]), (3, []), (4, [5]), (5, [])]),  # a resume in the middle of a rollout
    ],
)
def test_first_batch_of_a_rollout_carries_the_others(first, size, expected):
    batches = Batches(map(batch, range(first, 6)))
    found = [(block.step, [other.step for other in block.following]) for block in blocks(batches, first, size)]
    assert found == expected
    assert batches.closed


def test_closing_the_rollout_closes_its_batches():
    batches = Batches(map(batch, range(4)))
    stream = blocks(batches, 0, 2)
    assert next(stream).step == 0
    stream.close()
    assert batches.closed


def test_one_rollout_feeds_several_updates(tmp_path):
    steps = Steps(tmp_path, rollout_batches=2)
    state, found = steps.run(start(), 0, 4)
    names = [name for name, *_ in steps.calls]
    block = ["encode", "encode", "view", "roll_out", "judge", "score", "judge", "score", "update", "update"]
    assert names == block * 2
    assert [(view, clips, encoded, int(step)) for view, clips, encoded, step, _ in steps.of("roll_out")] == [
        ("view of 0", (0, 1), ("encoded 0", "encoded 1"), 0),
        ("view of 2", (2, 3), ("encoded 2", "encoded 3"), 2),
    ]
    # each update learns from its own clips and captions, with the newest parameters
    learned = [(s.params, e.clip, e.encoded, float(e.rollout.sampled[0, 0, 0])) for s, e in steps.of("update")]
    assert learned == [(step, step, f"encoded {step}", step) for step in range(4)]
    assert [int(metrics["staleness"]) for metrics, _ in found] == [0, 1, 0, 1]
    assert ["rollout_seconds" in perf for _, perf in found] == [True, False, True, False]
    assert [float(rollout.sampled[0, 0, 0]) for rollout in state.rollouts] == [2, 3]  # for a resume


def test_resume_restores_captions_from_the_state(tmp_path):
    steps = Steps(tmp_path, rollout_batches=3)
    undisturbed, _ = steps.run(start(), 0, 3)
    expected = steps.of("update")[1:]
    stopped, _ = Steps(tmp_path, rollout_batches=3).run(start(), 0, 3, stop=1)
    again = Steps(tmp_path, rollout_batches=3)
    state, found = again.run(stopped, 1, 3)
    assert not again.of("roll_out")
    assert [clip for _, clip in again.of("encode")] == [1, 2]
    for (_, one), (_, other) in zip(again.of("update"), expected, strict=True):
        assert (one.clip, one.encoded) == (other.clip, other.encoded)
        assert (one.rollout.sampled == other.rollout.sampled).all()
    assert [int(metrics["staleness"]) for metrics, _ in found] == [1, 2]
    assert state.params == undisturbed.params == 3
    assert [float(rollout.sampled[0, 0, 0]) for rollout in state.rollouts] == [
        0,
        1,
        2,
    ]  # for a second stop in this block


def test_record_lost_at_sampling_stays_excluded_after_a_resume(tmp_path):
    """Its captions were sampled without the clip, although a later start can read it. Later losses count too."""
    lost = jnp.array([0.0, 1.0])
    steps = Steps(tmp_path, rollout_batches=2)
    state, _ = steps.run(start(), 0, 2, stop=1, weights={1: lost})
    assert [rollout.lengths.tolist() for rollout in state.rollouts] == [[[2, 2], [2, 2]], [[0, 0], [2, 2]]]
    again = Steps(tmp_path, rollout_batches=2)
    again.run(state, 1, 2)
    assert again.of("update")[0][1].weight.tolist() == [0, 1]


def test_checkpoints_contain_rollouts_only_with_several_batches():
    """Without them a checkpoint has the form of earlier versions."""
    assert rest_of(start()).keys() == {"step", "params", "optimizer", "skipped", "in_row"}
    rollouts = (rollout_of(0), rollout_of(1))
    assert rest_of(start()._replace(rollouts=rollouts))["rollouts"] is rollouts


def test_policy_scores_are_computed_at_the_update_of_the_batch(tmp_path):
    steps = Steps(tmp_path, rollout_batches=2, passes=2)
    steps.run(start(), 0, 2)
    assert [(params, clip) for params, _, clip, *_ in steps.of("score")] == [(0, 0), (1, 1)]
    assert [name for name, *_ in steps.calls][-4:] == ["score", "update", "score", "update"]


def test_single_batch_has_no_staleness_and_stores_nothing(tmp_path):
    state, found = Steps(tmp_path).run(start(), 0, 2)
    assert state.rollouts == ()
    assert all("staleness" not in metrics for metrics, _ in found)


def test_only_the_first_update_warns_about_the_sampler_gap(tmp_path, capsys):
    """In later updates the gap includes the change of the policy."""
    steps = Steps(tmp_path, rollout_batches=2)
    steps.gaps = {2: 0.3, 3: 0.3, 4: 0.3}
    steps.run(start(), 0, 4)
    printed = capsys.readouterr().err
    assert [f"step {step}: warning: sampler_gap" in printed for step in (1, 2, 3, 4)] == [False, False, True, False]


def test_updates_do_not_wait_for_verdicts_of_later_batches(tmp_path):
    """The judge receives all captions before the first update, and only the answers of the batch are waited for."""
    released, waited = threading.Event(), []

    def answers(step):
        waited.append(step)
        assert step == 0 or released.wait(60)
        return SimpleNamespace(answers=None)

    steps = Steps(tmp_path, answers, rollout_batches=2)
    with jax.set_mesh(steps.mesh):
        first, second = blocks(Batches(map(batch, range(2))), 0, 2)
        state, _, finish = steps.step(start(), first)
        assert len(steps.of("judge")) == 2
        assert (waited, len(steps.of("update"))) == ([0], 1)
        assert finish()["judge_wait_seconds"] >= 0
        threading.Timer(0.5, released.set).start()
        _, _, finish = steps.step(state, second)
        assert finish()["judge_wait_seconds"] >= 0.3  # the devices had nothing to do

"""The training loop over a no-op step: when it saves, traces and closes."""

import json
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import tiny_run

from avocado_jax.checkpoint import training as checkpoint
from avocado_jax.checkpoint.orbax import finished_steps
from avocado_jax.config import SftConfig
from avocado_jax.data.pipeline import Batch, Lost
from avocado_jax.parallel.batches import rows_sharding
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train import loop, metrics
from avocado_jax.train.metrics import Log
from avocado_jax.train.reward_evaluation import rank_by_reward
from avocado_jax.train.run import Evaluator, rank_by_loss, run
from avocado_jax.train.state import State

STEP_SECONDS = 7 * 60.0
NOTHING = Evaluator()


class Checkpoints:
    """Records what is saved."""

    def __init__(self):
        self.steps, self.closed = [], False

    def save(self, step, *_):
        self.steps.append(step)

    def close(self):
        self.closed = True


@pytest.fixture
def clock(monkeypatch):
    """A clock for the loop that only steps advance."""
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, perf_counter=lambda: clock.now)
    monkeypatch.setattr(loop, "time", clock)
    return clock


def finish(folder, clock, steps=12, first=0, checkpoints=None, fails=None, evaluator=NOTHING, **fields):
    """Run to the end. Returns the saved steps."""
    checkpoints = checkpoints or Checkpoints()
    zero = jnp.zeros((), jnp.int32)
    state = State(zero + first, {"w": jnp.ones(2)}, None, zero, zero)

    def step(state, batch):
        clock.now += STEP_SECONDS
        if state.step + 1 == fails:
            raise RuntimeError("a step fails")
        values = dict(loss=1.0, lr=0.1, rows=1, tokens=8, clip_tokens=8, skipped_in_row=0)
        return state._replace(step=state.step + 1), {name: jnp.array(value) for name, value in values.items()}, dict

    mesh = make_mesh(-1, 1, 1)
    weight = jax.device_put(np.ones(mesh.size), rows_sharding(mesh))
    batch = Batch(*[None] * len(Batch._fields))._replace(epoch=0, padded=0.0, ids=(), lost=(), weight=weight)
    config = SftConfig(tensorboard=False, **({"checkpoint_every": 0, "eval_every": 0} | fields))
    plan = SimpleNamespace(
        digest="d", step=lambda number: SimpleNamespace(records=np.array([0]), bucket=None), position=lambda step: step
    )
    setup = SimpleNamespace(steps=steps, plan=plan, mesh=mesh)
    functions = dict(step=step, flops=lambda *_: 1.0, evaluator=evaluator)
    functions |= dict(programs=lambda buckets: [], batches=lambda first: (batch for _ in range(first, steps)))
    assert run(config, setup, str(folder), checkpoints, state, **functions) == 0
    return getattr(checkpoints, "steps", None)


@pytest.mark.parametrize(
    ("metric", "rank", "values", "best"),
    [("heldout_loss", rank_by_loss, [2, 1, 3, 4], 2), ("heldout_reward", rank_by_reward, [-2, 0.5, 0.7, -4], 3)],
)
def test_best_checkpoint_is_kept(tmp_path, clock, metric, rank, values, best):
    """The best has the lowest held-out loss or the highest held-out reward. The newest is kept too."""
    evaluator = Evaluator(lambda state, step: {metric: values[int(state.step) - 1]}, rank)
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    finish(tmp_path, clock, 4, checkpoints=checkpoints, evaluator=evaluator, checkpoint_every=1, eval_every=1)
    assert finished_steps(tmp_path) == [best, 4]
    assert rank({}) is None


def test_checkpoint_minutes_trigger_saves(tmp_path, clock):
    """With steps of 7 minutes, 20 have passed after the third, and the decision takes effect after the next step."""
    assert finish(tmp_path, clock) == [12]
    assert finish(tmp_path, clock, checkpoint_minutes=20) == [4, 8, 12]
    assert finish(tmp_path, clock, checkpoint_minutes=20, checkpoint_every=5) == [4, 5, 9, 10, 12]
    assert finish(tmp_path, clock, checkpoint_minutes=60 * 24) == [12]


def test_remaining_time_includes_the_evaluations(tmp_path, clock, capsys, monkeypatch):
    """8 steps of 7 minutes and 2 evaluations of an hour remain after the first evaluation."""
    monkeypatch.setattr(metrics, "time", clock)

    def evaluate(state, step):
        clock.now += 3600
        return {"heldout_loss": 1.0}

    finish(tmp_path, clock, 12, evaluator=Evaluator(evaluate, rank_by_loss), eval_every=4)
    (left,) = re.findall(r"step 4 of 12: .*, (\d+) min left", capsys.readouterr().err)
    assert 150 < int(left) < 190


def test_metrics_of_a_step_are_flushed_before_its_checkpoint(tmp_path, clock, monkeypatch):
    """Otherwise a run that is killed in between resumes after a step without metrics."""
    flushed, checkpoints = [], Checkpoints()
    real = Log.flush

    def flush(self):
        flushed.append(json.loads(self.path.read_text().splitlines()[-1])["step"])
        real(self)

    monkeypatch.setattr(Log, "flush", flush)
    monkeypatch.setattr(checkpoints, "save", lambda step, *_: checkpoints.steps.append((step, flushed[-1])))
    finish(tmp_path, clock, checkpoints=checkpoints, checkpoint_minutes=20)
    assert checkpoints.steps == [(4, 4), (8, 8), (12, 12)]


@pytest.fixture
def traces(monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))
    return calls


def test_resume_inside_the_profile_window_traces_the_rest(tmp_path, clock, traces):
    assert finish(tmp_path, clock, first=4, profile=(3, 6)) == [12]
    assert traces == ["start", "stop"]


def test_failure_keeps_the_trace_and_closes_everything(tmp_path, clock, traces, monkeypatch, capsys):
    """The error of the step determines the exit status, not later failures."""

    def close(log):
        raise OSError("no storage")

    checkpoints = Checkpoints()
    monkeypatch.setattr(Log, "close", close)
    with pytest.raises(RuntimeError, match="a step fails"):
        finish(tmp_path, clock, checkpoints=checkpoints, fails=5, profile=(3, 6))
    assert traces == ["start", "stop"]
    assert checkpoints.closed
    assert "also: no storage" in capsys.readouterr().err
    with pytest.raises(OSError, match="no storage"):
        finish(tmp_path, clock)


def test_resumed_run_reports_its_step(capsys):
    _, storage = tiny_run(first=3)
    assert [line["step"] for line in storage.lines] == [4]
    assert "resuming after step 3 of 4\n" in capsys.readouterr().err
    tiny_run()
    assert "resuming" not in capsys.readouterr().err


def test_lost_spare_clips_are_listed(capsys):
    mesh = make_mesh(-1, 1, 1)
    rows = [jax.device_put(np.full(mesh.size, value, np.float32), rows_sharding(mesh)) for value in (1, 0)]
    empty = Batch(**dict.fromkeys(Batch._fields))._replace(epoch=0, padded=0.0, lost=(), spares=())
    spare = empty._replace(ids=("spare", *[""] * (mesh.size - 1)), weight=rows[1], lost=(Lost(0, "spare", "too long"),))
    batch = empty._replace(step=0, ids=("clip",) * mesh.size, clip=rows[0], weight=rows[0], spares=(spare,))
    assert tiny_run(steps=1, batches=lambda first: (one for one in [batch]))[0] == 0
    assert "step 1: spare is lost: too long\n" in capsys.readouterr().err

"""The training loop: input, metrics, checkpoints, stop and resume. It is independent of the computation of a step.

All metrics outside "perf" are a function of the config: a run that is killed and resumed writes bit-identical metrics.
Therefore the metrics of a step are written to disk before its checkpoint.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from avocado_jax.checkpoint.training import Checkpoints
from avocado_jax.data.pipeline import Batch
from avocado_jax.parallel.liveness import progress
from avocado_jax.train.agree import lost_records
from avocado_jax.train.inputs import InputMonitor
from avocado_jax.train.metrics import Log, Meter, ProgressLog
from avocado_jax.train.profile import Profile
from avocado_jax.train.state import State, rest_of
from avocado_jax.train.stop import StepFlags


class Job(NamedTuple):
    """The functions and settings of a run.

    Attributes:
        steps: number of steps of the run.
        batches: first step -> batches on the mesh from that step on.
        step: (state, batch on the mesh) -> (state, scalar metrics, finish), dispatched asynchronously. The loop calls
            `finish()` after it has fetched the metrics: it writes further output and returns entries for "perf".
        evaluate: (state, step) -> entries for the step's line of metrics, such as `heldout_loss`.
        flops: (batch, metrics) -> model FLOPs of the step on all devices.
        rank: entries of `evaluate` -> the metric to rank checkpoints by, lower is better; None: unranked.
        rows: step (from 0) -> number of rows in the plan.
        position: data stored in each checkpoint.
        checkpoint_every: steps between checkpoints; 0: off.
        checkpoint_minutes: maximum minutes between checkpoints, by the clock of process 0; 0: off.
    """

    steps: int
    batches: Callable[[int], Iterator[Batch]]
    step: Callable[[State, Batch], tuple[State, dict[str, jax.Array], Callable[[], dict[str, Any]]]]
    evaluate: Callable[[State, int], dict[str, Any]]
    flops: Callable[[Batch, dict[str, float]], float]
    rank: Callable[[dict[str, Any]], float | None]
    rows: Callable[[int], int]
    position: dict[str, Any]
    checkpoint_every: int
    checkpoint_minutes: float
    eval_every: int
    max_skipped: int
    profile: tuple[int, ...]


class _Pending(NamedTuple):
    """A dispatched step whose metrics are not fetched yet."""

    number: int  # from 1
    batch: Batch
    metrics: dict[str, jax.Array]
    finish: Callable[[], dict[str, Any]]
    flags: jax.Array | np.ndarray  # [stop, save], the same on every process
    input_wait: float


def train(job: Job, state: State, mesh: Mesh, checkpoints: Checkpoints, log: Log, profile_to: str) -> int:
    """Run from `state.step` to the last step. Returns 0, or 75 after a stop by a signal and a save.

    Raises:
        FloatingPointError: `max_skipped` steps in a row had no finite gradient.
        OSError: a checkpoint cannot be saved. Earlier checkpoints are complete.
    """
    meter, progress_log, flags = Meter(), ProgressLog(job.steps, job.eval_every), StepFlags(mesh)
    profile = Profile(job.profile, profile_to)
    pending: _Pending | None = None
    monitor, first, saved_at, stopped_at = InputMonitor(), int(state.step), time.monotonic(), 0

    if first and jax.process_index() == 0:
        print(f"resuming after step {first} of {job.steps}", file=sys.stderr, flush=True)

    def due(number: int, every: int) -> bool:
        return number == job.steps or (every > 0 and number % every == 0)

    def save_overdue() -> bool:
        """Whether the newest checkpoint is older than `checkpoint_minutes`, on the clock of this process."""
        return 0 < job.checkpoint_minutes * 60 <= time.monotonic() - saved_at

    def finish(done: _Pending, more: dict[str, Any]) -> tuple[bool, bool]:
        """Fetch and log the metrics of a step. Returns whether all processes stop, and save, after the next step."""
        batch, scalars = done.batch, {name: value.item() for name, value in jax.device_get(done.metrics).items()}
        flags.step_finished()  # before the line is written: a reader of the line may send SIGTERM and expect a save
        scalars["lost"] = job.rows(done.number - 1) - scalars.pop("rows")
        tokens = scalars["tokens"] + scalars["clip_tokens"]
        perf = meter.perf(tokens, job.flops(batch, scalars), batch.padded, done.input_wait) | done.finish()
        line = {"step": done.number, "epoch": batch.epoch, **_finite(scalars | more), "perf": perf}
        log.write(line)
        progress_log.write(line)
        for lost in (line for part in (batch, *batch.spares) for line in lost_records(part, mesh)):
            print(f"step {done.number}: {lost}", file=sys.stderr)
        if scalars["skipped_in_row"] >= job.max_skipped:
            raise FloatingPointError(f"{job.max_skipped} steps in a row without a finite gradient; last: {done.number}")
        stop, save = np.asarray(done.flags, bool).tolist()
        return stop, save

    stream = job.batches(first)
    # Close the flags last: a signal must not interrupt a save.
    with _closing(profile, stream, log, checkpoints, flags):
        for number in range(first + 1, job.steps + 1):
            # --- dispatch a step, and fetch the metrics of the previous one while it runs
            progress(number, "input")
            begun = time.perf_counter()
            batch = next(stream)
            waited = time.perf_counter() - begun
            progress(number, "step")
            monitor.step(waited, len(batch.ids))
            profile.before_step(number)
            state, metrics, finish_step = job.step(state, batch)
            stop, save = finish(pending, {}) if pending else (False, False)
            # Free the arrays with the step.
            bare = _without_arrays(batch)._replace(spares=tuple(map(_without_arrays, batch.spares or ())))
            pending = _Pending(number, bare, metrics, finish_step, flags.dispatch(save=save_overdue()), waited)

            # --- fetch this step's metrics too if an evaluation or a checkpoint follows
            profile.after_step(number, metrics)
            evaluated, saved = due(number, job.eval_every), save or due(number, job.checkpoint_every)
            if evaluated or saved or stop:
                progress(number, "evaluation")
                more = job.evaluate(state, number) if evaluated else {}  # also on a stop, for identical metrics
                stop_now, save_now = finish(pending._replace(flags=flags.dispatch(save=save_overdue())), more)
                stop, saved, pending = stop or stop_now, saved or save_now, None
                progress(number, "checkpoint")
                log.flush()
                if saved or stop:
                    checkpoints.save(number, state.params, rest_of(state), job.position, job.rank(more))
                    saved_at = time.monotonic()
            if stop and number < job.steps:
                stopped_at = number
                break
    if stopped_at and jax.process_index() == 0:
        print(f"saved step {stopped_at} of {job.steps}; the same command resumes", file=sys.stderr, flush=True)
    return 75 if stopped_at else 0


def _without_arrays(batch: Batch) -> Batch:
    return batch._replace(clip=None, captions=None, references=None, following=(), spares=())


@contextmanager
def _closing(*resources: Any) -> Iterator[None]:
    """Close resources in order after the block. Raises the first error, so the error of the block sets the status."""
    errors: list[BaseException] = []
    try:
        yield
    except BaseException as error:
        errors.append(error)
    for resource in resources:
        try:
            resource.close()
        except Exception as error:
            errors.append(error)
    for error in errors[1:]:
        print(f"also: {error}", file=sys.stderr)
    if errors:
        raise errors[0]


def _finite(scalars: dict[str, Any]) -> dict[str, Any]:
    """Replace NaN and infinities, which JSON does not support, by None."""
    return {name: value if math.isfinite(value) else None for name, value in scalars.items()}

"""The training loop over steps that sum ones over all devices: a fast run of any number of processes."""

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.data.pipeline import Batch
from avocado_jax.parallel.batches import prefetch_to_mesh
from avocado_jax.parallel.mesh import make_mesh
from avocado_jax.train.loop import Job, train
from avocado_jax.train.state import State

METRICS = ("loss", "lr", "tokens", "clip_tokens", "rows", "skipped", "skipped_in_row")


class Storage:
    """Fake log and checkpoints of a run, which record saves and lines of metrics."""

    def __init__(self):
        self.saved, self.lines = [], []

    def write(self, line):
        self.lines.append(line)

    def save(self, step, *_):
        self.saved.append(step)

    def flush(self):
        pass

    close = flush


def tiny_run(
    read=lambda step: None, skipped_in_row=lambda step: 0, evaluate=lambda state, step: {}, steps=4, first=0, **fields
):
    """Run some steps. Returns the exit status and the storage.

    Args:
        read: called with the number of a batch in the reader's thread, before the batch is there.
        first: the step from which the run resumes.
        fields: of `Job`, instead of those here.
    """
    mesh = make_mesh(-1, 1, 1)
    empty = Batch(**dict.fromkeys(Batch._fields))._replace(epoch=0, padded=0.0, lost=[], ids=("a", "b"))

    def batches(first):
        for number in range(first + 1, steps + 1):
            read(number)
            rows = np.ones(jax.local_device_count(), np.float32)
            yield empty._replace(clip=rows, weight=rows, step=number - 1)

    add = jax.jit(jnp.sum)

    def step(state, batch):
        metrics = dict.fromkeys(METRICS, add(batch.clip))
        return state, metrics | {"skipped_in_row": jnp.full((), skipped_in_row(batch.step + 1))}, dict

    job = Job(
        steps=steps,
        batches=lambda first: prefetch_to_mesh(batches(first), mesh),
        step=step,
        evaluate=evaluate,
        flops=lambda *_: 1.0,
        rank=lambda _: None,
        rows=lambda _: jax.device_count(),
        position={},
        checkpoint_every=0,
        checkpoint_minutes=0.0,
        eval_every=0,
        max_skipped=3,
        profile=(),
    )
    storage = Storage()
    state = State(**dict.fromkeys(State._fields, jnp.full((), first, jnp.int32)))
    with jax.set_mesh(mesh):
        return train(job._replace(**fields), state, mesh, storage, storage, ""), storage

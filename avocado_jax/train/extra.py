"""User terms that run on the hosts: one process computes each value, all processes receive it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.data.pipeline import Batch
from avocado_jax.parallel.batches import process_rows, rows_sharding
from avocado_jax.parallel.replicas import observe, row_owners
from avocado_jax.rewards.extra import Term
from avocado_jax.train.rollout import Rollout
from avocado_jax.typing import Array, Bool, Float

UNKNOWN, FAILED = -np.inf, np.inf  # values in place of results while processes share them


class Computed(NamedTuple):
    """The values of a term for a batch, the same on all processes."""

    answers: Float[Array, "B G"]  # NaN without a verdict, and in rows without weight
    failed: Bool[Array, ""]  # whether the function raised an exception on a process


class HostTerm:
    """A term of kind "host" in a run.

    The function runs in a background thread, concurrently with the devices. Batches are processed in the order of their
    rollouts.
    """

    def __init__(self, term: Term, mesh: Mesh, text: Callable[[Sequence[int]], str]):
        """`text` maps token ids of a caption to its text."""
        self._term, self._mesh, self._text = term, mesh, text
        self._error: RuntimeError | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"term {term.name}")
        rows, replicated = rows_sharding(mesh), NamedSharding(mesh, PartitionSpec())
        self._gather = jax.jit(lambda tree: tree, out_shardings=replicated)

        @partial(jax.jit, out_shardings=Computed(rows, replicated))
        def share(observed: Float[Array, "R B G"]) -> Computed:
            values = jnp.max(observed, axis=0)  # no NaN: not every backend's reduction over devices propagates it
            return Computed(jnp.where(jnp.isfinite(values), values, jnp.nan), jnp.any(values == FAILED))

        self._share = share

    def start(self, rollout: Rollout, batch: Batch) -> Callable[[], Computed]:
        """Start the function on this process's captions. The result waits for all processes."""
        rows = rollout.captions.targets, rollout.lengths, batch.weight
        tokens, lengths, weight = jax.device_get(self._gather(rows))
        process, (size, group) = jax.process_index(), lengths.shape
        local, owners = process_rows(self._mesh, size, process), row_owners(self._mesh, size)
        places = [index for index, row in enumerate(local) if weight[row] and owners[row] == process]
        captions = [
            self._text(ids[:length].tolist())
            for row in (local[index] for index in places)
            for ids, length in zip(tokens[row], lengths[row])
        ]
        references = [batch.records[index] for index in places for _ in range(group)]
        running = self._thread.submit(self._term.values, captions, references) if captions else None

        def collect() -> Computed:
            observed = np.full((len(local), group), UNKNOWN, np.float32)
            try:
                if running:
                    values = running.result().astype(np.float32).reshape(-1, group)
                    observed[places] = np.where(np.isnan(values), UNKNOWN, values)
            except RuntimeError as error:  # all processes must know of the failure before one exits
                self._error, observed = error, np.full_like(observed, FAILED)
            with jax.debug_nans(False):  # a caption without a verdict is NaN
                return self._share(observe(self._mesh, local, size, observed))

        return collect

    def check(self, computed: Computed) -> None:
        """Raise the exception of the function, on all processes. Waits for the devices.

        Raises:
            RuntimeError: the function raised an exception, here or on another process.
        """
        if jax.device_get(computed.failed):
            raise self._error or RuntimeError(f"the term {self._term.name} failed on another process: see its output")

"""Time of each phase of a step, measured by a thread that waits for its results; the step itself does not wait."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Phases:
    """The phases of one step after another.

    A phase begins when the one before it has ended, or when it was dispatched, whichever is later.
    """

    def __init__(self) -> None:
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="phases")
        self._ended = self._dispatched = 0.0
        self._step: dict[str, Future] = {}

    def begin(self) -> None:
        """A new step."""
        self._dispatched, self._step = time.perf_counter(), {}

    def end(self, name: str, results: Any) -> None:
        """A phase was dispatched, whose results are these. None of them may be donated to what follows.

        The seconds of several phases of one name are added, as are those of `idle`.
        """
        self._step[name] = self._waiting.submit(self._wait, results, self._dispatched, self._step.get(name))
        self._dispatched = time.perf_counter()

    def idle(self, name: str) -> None:
        """The host has waited for something else until now; the entry is the time for which the devices had no work."""
        now, before = time.perf_counter(), self._step.get(name)
        self._dispatched = now
        self._step[name] = self._waiting.submit(
            lambda: max(0.0, now - self._ended) + (before.result() if before else 0)
        )

    def _wait(self, results: Any, dispatched: float, before: Future | None) -> float:
        jax.block_until_ready(results)
        begun, self._ended = max(self._ended, dispatched), time.perf_counter()
        return self._ended - begun + (before.result() if before else 0)

    def step(self) -> dict[str, Future]:
        """The phases of the step so far, in the order they were dispatched; their values are seconds."""
        return self._step

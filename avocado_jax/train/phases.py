"""Measure the time of each phase of a step in a background thread, without blocking the step."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax


class Phases:
    """Times the phases of consecutive steps.

    A phase starts when the previous one has ended, or when it was dispatched, whichever is later.
    """

    def __init__(self) -> None:
        self._waiting = ThreadPoolExecutor(1, thread_name_prefix="phases")
        self._ended = self._dispatched = 0.0
        self._step: dict[str, Future] = {}

    def begin(self) -> None:
        """Start a new step."""
        self._dispatched, self._step = time.perf_counter(), {}

    def end(self, name: str, results: Any) -> None:
        """Record a dispatched phase and its results, which must not be donated later.

        The times of phases with the same name are added, as for `idle`.
        """
        self._step[name] = self._waiting.submit(self._wait, results, self._dispatched, self._step.get(name))
        self._dispatched = time.perf_counter()

    def idle(self, name: str) -> None:
        """Record that the host has waited until now. The entry is the time in which the devices were idle."""
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
        """The seconds of the step's phases, in the order of dispatch."""
        return self._step

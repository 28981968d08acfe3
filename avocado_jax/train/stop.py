"""Synchronise decisions of all processes: stop after SIGTERM or SIGINT, save a checkpoint."""

import os
import signal
import sys
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from avocado_jax.parallel.signals import exit_unsaved, on_signal

# Maximum time from the signal to the exit. Longer than two steps and a save of the 7B configs; launchers wait longer.
GRACE_SECONDS = 90.0


class StepFlags:
    """Broadcasts "stop" and "save" through a device array, so that all processes read the same value at one step.

    SIGTERM and SIGINT set "stop". Before the first `step_finished` there is nothing to save, and the process exits with
    75 immediately. Later it has `GRACE_SECONDS` to finish its step and save. After this time, or on a second SIGINT, it
    exits with 75.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._stop, self._unsaved = threading.Event(), threading.Event()
        self._everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._local = len([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
        self._any = jax.jit(lambda flags: flags.max(axis=0), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self.close = on_signal((signal.SIGTERM, signal.SIGINT), self._received)

    def _received(self, number: int) -> None:
        if not self._unsaved.is_set():
            exit_unsaved(number)
        if self._stop.is_set():
            if number == signal.SIGINT:
                os._exit(75)
            return
        self._stop.set()
        print("stopping: finishing this step and saving a checkpoint", file=sys.stderr, flush=True)
        timer = threading.Timer(GRACE_SECONDS, os._exit, (75,))
        timer.daemon = True
        timer.start()

    def step_finished(self) -> None:
        """Record that a step has finished, so that a stop must save."""
        self._unsaved.set()

    def dispatch(self, save: bool) -> jax.Array | np.ndarray:
        """Dispatch the reduction of [stop, save] over processes. Read the result with `bool(array[i])`, which blocks.

        Args:
            save: whether a checkpoint is due by the clock. Only the value of process 0 is used.
        """
        mine = [self._stop.is_set(), save and jax.process_index() == 0]
        if jax.process_count() == 1:
            return np.array(mine)
        flags = np.full((self._local, 2), mine, np.int32)
        return self._any(jax.make_array_from_process_local_data(self._everywhere, flags))

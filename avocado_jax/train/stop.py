"""SIGTERM: the loop is told, ends its step, saves and returns 75."""

import os
import signal
import sys
import threading

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

GRACE_SECONDS = 90.0  # to end the step and save; then the process ends with what it saved before


class Stop:
    """Listens for SIGTERM from construction on, in Python code and inside long compilations alike."""

    def __init__(self, mesh: Mesh) -> None:
        self._asked = threading.Event()
        self._everywhere = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._local = len([device for device in mesh.devices.flat if device.process_index == jax.process_index()])
        self._any = jax.jit(lambda flags: flags.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        reading, writing = os.pipe()
        os.set_blocking(writing, False)
        # The interpreter runs handlers between bytecodes only; what it writes to a descriptor comes at once.
        signal.signal(signal.SIGTERM, lambda *_: None)
        signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(reading,), daemon=True).start()

    def _listen(self, reading: int) -> None:
        while number := os.read(reading, 1):
            if number[0] == signal.SIGTERM and not self._asked.is_set():
                self._asked.set()
                print("stopping: this step is ended and saved", file=sys.stderr, flush=True)
                ended = threading.Timer(GRACE_SECONDS, os._exit, (75,))
                ended.daemon = True
                ended.start()

    def flag(self) -> jax.Array | bool:
        """Whether any process was asked to stop, as an array where there are several: all read the same value."""
        if jax.process_count() == 1:
            return self._asked.is_set()
        mine = np.full(self._local, self._asked.is_set(), np.int32)
        return self._any(jax.make_array_from_process_local_data(self._everywhere, mine))

"""The processes of a job: how they meet, and how all of them end when one is lost or fails."""

import atexit
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import jax

from avocado_jax.errors import InputError

HEARTBEAT_SECONDS = 10  # after which a lost process ends the others (facts: 6 s measured; jax's default 95 s)
START_SECONDS = 300  # for all processes to come
ABORT_SECONDS = 2 * HEARTBEAT_SECONDS  # within which jax has ended this process, if another one is lost


@contextmanager
def joined(
    coordinator: str | None, processes: int | None, process: int | None, devices: int | None = None
) -> Iterator[None]:
    """Be one of the processes of a job for as long as the block lasts; alone, where none of the first three is given.

    On TPU pods and under Slurm jax knows all three by itself: pass "auto" as the coordinator.

    When another process is lost, jax ends this one by SIGABRT. When the block fails here, the others are told in the
    same way: this process ends without waiting for them, since they may wait for it in the middle of a step.

    Args:
        devices: how many all processes have together; None: any number.

    Raises:
        InputError: the three do not belong together, or the devices are not so many.
    """
    alone = coordinator is None and processes is None and process is None
    if not alone:
        _join(coordinator, processes, process)
    try:
        if devices is not None and jax.device_count() != devices:
            raise InputError(f"--devices {devices}: {jax.process_count()} processes have {jax.device_count()} together")
        yield
    except Exception as error:
        if not alone and jax.process_count() > 1:
            if not isinstance(error, InputError):
                print("a failure; if a process was lost, this one is ended too", file=sys.stderr, flush=True)
                time.sleep(ABORT_SECONDS)
            # Runs before what jax has registered, which waits for all processes.
            atexit.register(_leave, 2 if isinstance(error, InputError) else 1)
        raise


def _join(coordinator: str | None, processes: int | None, process: int | None) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # of processes without accelerators
    # jax's own time-out ends the process with pages of C++ frames: ours comes first.
    times = dict(heartbeat_timeout_seconds=HEARTBEAT_SECONDS, initialization_timeout=2 * START_SECONDS)
    if coordinator == "auto":
        with deadline(START_SECONDS, "the processes of this job have not met: are all hosts up, and their ports open?"):
            try:
                jax.distributed.initialize(**times)
            except (ValueError, OSError, RuntimeError) as error:
                raise InputError(f"--coordinator auto: no TPU pod or Slurm job is known here ({error})") from error
        return
    if coordinator is None or processes is None or process is None or not 0 <= process < processes:
        raise InputError("--coordinator HOST:PORT, --processes N and --process I (0..N-1) go together")
    which = f"process {process} of {processes}: the others have not met it at {coordinator}"
    with deadline(START_SECONDS, f"{which}: are all of them up, and is the port open?"):
        jax.distributed.initialize(coordinator, processes, process, **times)


@contextmanager
def deadline(seconds: float, complaint: str) -> Iterator[None]:
    """End the process with status 75 and one line, unless the block is through in time: it may wait where nothing
    can interrupt it, for hosts that are not there.
    """

    def give_up() -> None:
        print(f"{complaint} (waited {seconds:g} s)", file=sys.stderr, flush=True)
        os._exit(75)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _leave(status: int) -> None:
    """End now, with what was said."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)

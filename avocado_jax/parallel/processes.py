"""Start the processes of a job with jax.distributed, and stop the job if one process fails."""

import atexit
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import jax
from jax._src import distributed

from avocado_jax.config import TimeoutConfig
from avocado_jax.errors import InputError, exit_status, runtime_code
from avocado_jax.parallel import liveness
from avocado_jax.parallel.signals import exit_unsaved, on_signal

STOP = (signal.SIGTERM, signal.SIGINT)
EXIT_SECONDS = 20.0  # maximum time to print an error and exit, even if threads still run


@contextmanager
def init_distributed(
    coordinator: str | None,
    processes: int | None,
    process: int | None,
    devices: int | None,
    timeouts: TimeoutConfig,
) -> Iterator[None]:
    """Initialise jax.distributed for the duration of the block, and monitor the progress of the job.

    For a single process (the first three arguments are None), only the watchdog runs. On TPU pods and under Slurm, jax
    detects all three: pass "auto" as the coordinator. If a process is lost, jax aborts the others (SIGABRT). If the
    block fails, this process exits without waiting for the others, which may wait for it in the middle of a step.

    Args:
        devices: expected number of devices of all processes; None: any number.

    Raises:
        InputError: the arguments are inconsistent, or the number of devices differs.
        ConnectionError: the block failed after another process was lost.
    """
    several = not (coordinator is None and processes is None and process is None)
    # Before and between steps there is nothing to save: SIGTERM and Ctrl-C exit at once, also inside a C++ call.
    with ExitStack() as cleanup:
        cleanup.callback(on_signal(STOP, exit_unsaved))
        if several:
            _initialize(coordinator, processes, process, timeouts)
            cleanup.close()  # jax has replaced the handlers
            cleanup.callback(on_signal(STOP, exit_unsaved))
        watch = liveness.start(
            timeouts.heartbeat,
            timeouts.step,
            distributed.global_state.client,
            distributed.global_state.process_id,
            distributed.global_state.num_processes,
        )
        cleanup.callback(watch.close)
        try:
            if devices is not None and jax.device_count() != devices:
                together = f"{jax.process_count()} processes have {jax.device_count()} together"
                raise InputError(f"--devices {devices}: {together}")
            yield
        except Exception as error:
            if several and jax.process_count() > 1:
                _exit_before_the_others(error, watch, 2 * timeouts.heartbeat)
            raise


def _exit_before_the_others(error: Exception, watch: liveness.Liveness, patience: float) -> None:
    """Exit with the status of `error` without waiting for other processes, which may wait in the middle of a step.

    Raises:
        ConnectionError: another process was lost, which caused `error`.
    """
    # A lost process may cause any runtime error. A retry then helps, regardless of the status code.
    if runtime_code(error) not in (None, "RESOURCE_EXHAUSTED"):
        print(f"{error}\nchecking whether a host was lost", file=sys.stderr, flush=True)
        if lost := watch.lost_peers(patience):
            _exit_soon(1)
            reason = str(error).splitlines()[0]
            raise ConnectionError(f"lost {', '.join(lost)}; {reason}") from error
    _exit_soon(exit_status(error))


def _exit_soon(status: int) -> None:
    """Exit at the end of the main thread, before jax's handlers, which wait for all processes, and despite threads."""

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)

    atexit.register(leave)
    timer = threading.Timer(EXIT_SECONDS, leave)
    timer.daemon = True
    timer.start()


def _initialize(coordinator: str | None, processes: int | None, process: int | None, timeouts: TimeoutConfig) -> None:
    jax.config.update("jax_cpu_collectives_implementation", "gloo")  # for processes without accelerators
    # jax's timeout aborts with pages of C++ frames, so `deadline` has a shorter timeout.
    times = dict(heartbeat_timeout_seconds=timeouts.heartbeat, initialization_timeout=2 * timeouts.start)
    if coordinator == "auto":
        with deadline(timeouts.start, "not all hosts of this job have started: are all up, and their ports open?"):
            try:
                jax.distributed.initialize(**times)
            except (ValueError, OSError, RuntimeError) as error:
                raise InputError(f"--coordinator auto: no TPU pod or Slurm job is known here ({error})") from error
        return
    if coordinator is None or processes is None or process is None or not 0 <= process < processes:
        raise InputError("--coordinator HOST:PORT, --processes N and --process I (0..N-1) go together")
    which = f"process {process} of {processes}: not all others have reached {coordinator}"
    with deadline(timeouts.start, f"{which}: are all of them up, and is the port open?"):
        jax.distributed.initialize(coordinator, processes, process, **times)


@contextmanager
def deadline(seconds: float, message: str) -> Iterator[None]:
    """Exit with status 75 and a message if the block takes too long. The block may be uninterruptible."""

    def give_up() -> None:
        print(f"{message} (waited {seconds:g} s)", file=sys.stderr, flush=True)
        os._exit(75)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()

"""Retries and timeouts of calls."""

import queue
import threading
import time
from collections.abc import Callable
from typing import TypeVar

from avocado_jax.data.storage_errors import StorageError
from avocado_jax.errors import first_line

T = TypeVar("T")


def retried(call: Callable[[], T], what: str, transient: tuple[type[BaseException], ...], patience: float) -> T:
    """Retry `call` until it succeeds, with waits of 0.1 s, 0.2 s, ... up to 10 s between attempts.

    Args:
        what: prefix of the error message.
        transient: exceptions to retry.
        patience: seconds of retries after the first failure.

    Raises:
        StorageError: the retries ran out.
    """
    deadline, wait = 0.0, 0.1
    while True:
        try:
            return call()
        except transient as error:
            deadline = deadline or time.monotonic() + patience
            if time.monotonic() + wait > deadline:
                raise StorageError(f"{what}: {first_line(error)}") from error
            time.sleep(wait)
            wait = min(2 * wait, 10.0)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Run `call` in a new thread with a timeout.

    Decoders and storage clients may hang in C code, which cannot be interrupted. The thread is then abandoned.

    Raises:
        TimeoutError: the call did not return in time.
    """
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:  # re-raised in the caller's thread
            answer.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"took longer than {seconds:g} s") from None
    if error is not None:
        raise error
    return value

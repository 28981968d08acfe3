"""Concurrent storage calls: results in order, with bounded memory."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from avocado_jax.data.storage import REQUESTS

T = TypeVar("T")
R = TypeVar("R")
MEMORY = 256 * 2**20  # bytes


def map_ordered(
    call: Callable[[T], R],
    items: Iterable[T],
    nbytes: Callable[[T], int] = lambda item: 0,
    memory: int = MEMORY,
    at_once: int = REQUESTS,
) -> Iterator[R]:
    """Yield the results of `call` in the order of `items`. Later results are computed in threads.

    Args:
        call: called by at most `at_once` threads; at most twice as many results are pending.
        nbytes: memory of a call and its result.
        memory: maximum bytes of pending calls. A larger call runs alone.

    Raises:
        Exception: exceptions of `call` or `items`, in order.
    """
    waiting: deque[tuple[int, Future[R]]] = deque()
    used = 0

    def oldest() -> R:
        nonlocal used
        size, future = waiting.popleft()
        used -= size
        return future.result()

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for item in items:
                size = nbytes(item)
                while waiting and (used + size > memory or len(waiting) >= 2 * at_once):
                    yield oldest()
                used += size
                waiting.append((size, pool.submit(call, item)))
            while waiting:
                yield oldest()
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

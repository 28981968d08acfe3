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
    """Results of `call`, in the order of `items`. While one is used, the next ones are computed in threads.

    Args:
        call: it is called by at most `at_once` threads; at most twice as many results wait.
        nbytes: memory that a call and its result take.
        memory: bytes of the calls that have begun and whose results are not used yet. A call that takes more waits
            until it is alone.

    Raises:
        Exception: what a call or `items` raised, in its place in the order.
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

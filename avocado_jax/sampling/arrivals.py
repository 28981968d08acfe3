"""The queue of clips that wait for a slot, by shape and in order of arrival, with a limit on their bytes."""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from avocado_jax.data.rows import Row, Shape, rounded, shape_of

SHAPE_BITS = 2  # leading bits of each padded size: few shapes, and so few programs
WAITING_BYTES = 4 * 2**30  # maximum bytes of waiting clips


class Request(NamedTuple):
    """A clip to caption, or an error.

    Attributes:
        item: returned with the caption.
        row: the clip, or the error from reading it.
        number: determines the random draws, together with the seed.
    """

    item: Any
    row: Row | Exception
    number: int


class Arrivals:
    """Requests by the padded shape of their clips.

    Args:
        requests: tuples with the fields of `Request`. A sequence is read immediately, other iterables in a thread.
        shape: padded shape of all clips; None: each clip's sizes, rounded up.
    """

    def __init__(self, requests: Iterable[tuple[Any, Row | Exception, int]], shape: Shape | None) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._shape, self._closed, self._ended = shape, threading.Event(), False
        self._error: BaseException | None = None  # exception of the iterable
        self._errors: list[tuple[Any, Exception]] = []
        self._waiting: dict[Shape, deque[Request]] = {}  # ordered by the oldest clip of each shape
        self._bytes, self._fewer = 0, threading.Condition()
        if isinstance(requests, Sequence):
            self._read(requests)
        else:
            threading.Thread(target=self._read, args=(requests,), daemon=True).start()

    def _read(self, requests: Iterable[tuple[Any, Row | Exception, int]]) -> None:
        bounded = not isinstance(requests, Sequence)
        try:
            for item, row, number in requests:
                if self._closed.is_set():
                    return
                self._queue.put(Request(item, row, number))
                if isinstance(row, Exception):
                    continue
                with self._fewer:
                    self._bytes += nbytes(row)
                    while bounded and self._bytes > WAITING_BYTES and not self._closed.is_set():
                        self._fewer.wait(1.0)
            self._queue.put(None)
        except BaseException as error:  # raised in the consumer's thread, after the captions of earlier clips
            self._queue.put(error)

    def receive(self, block: bool = False) -> None:
        """Sort new arrivals. With `block`, wait for an arrival or the end."""
        while not self._ended:
            try:
                arrived = self._queue.get(block=block)
            except queue.Empty:
                return
            block = False
            if not isinstance(arrived, Request):
                self._ended, self._error = True, arrived
            elif isinstance(arrived.row, Exception):
                self._errors.append((arrived.item, arrived.row))
            else:
                self._waiting.setdefault(self._shape_of(arrived), deque()).append(arrived)

    def gather(self, count: int, seconds: float) -> None:
        """Wait up to `seconds` until `count` clips have arrived."""
        end = time.monotonic() + seconds
        while not self._ended and self._bytes <= WAITING_BYTES and time.monotonic() < end:
            if sum(map(self.waiting, self._waiting)) >= count:
                return
            time.sleep(0.01)
            self.receive()

    def _shape_of(self, request: Request) -> Shape:
        return self._shape or rounded(shape_of(request.row.clip), SHAPE_BITS)

    def next_clip(self) -> bool:
        """Wait for a clip, an error or the end. Returns False at the end. Raises the exception of the iterable."""
        self.receive(block=not self._waiting)
        if self._waiting or self._errors or not self._ended:
            return True
        if self._error is not None:
            raise self._error
        return False

    def shapes(self, tokens: int | None = None) -> list[Shape]:
        """The shapes of waiting clips with `tokens` padded tokens (None: any), ordered by their oldest clip."""
        return [shape for shape in self._waiting if tokens is None or shape.tokens == tokens]

    def others(self, tokens: int) -> bool:
        """Whether clips with another number of padded tokens are waiting."""
        return len(self.shapes(tokens)) < len(self._waiting)

    def waiting(self, shape: Shape) -> int:
        """The number of waiting clips of a shape."""
        return len(self._waiting.get(shape, ()))

    def take(self, shape: Shape, count: int) -> list[Request]:
        """Remove and return the oldest clips of a shape."""
        clips = self._waiting.pop(shape, deque())
        taken = [clips.popleft() for _ in range(min(count, len(clips)))]
        if clips:  # move to the end: the oldest clips of other shapes are older than most of these
            self._waiting[shape] = clips
        with self._fewer:
            self._bytes -= sum(nbytes(request.row) for request in taken)
            self._fewer.notify()
        return taken

    def put_back(self, requests: Sequence[Request]) -> None:
        """Return clips to the front of the queue."""
        for request in reversed(requests):
            self._waiting.setdefault(self._shape_of(request), deque()).appendleft(request)
        with self._fewer:
            self._bytes += sum(nbytes(request.row) for request in requests)

    def failed(self) -> list[tuple[Any, Exception]]:
        """The failed requests that have arrived since the last call."""
        failed, self._errors = self._errors, []
        return failed

    def close(self) -> None:
        """Stop the reading thread."""
        self._closed.set()


def nbytes(row: Row) -> int:
    """The bytes of a row's arrays."""
    return sum(np.asarray(leaf).nbytes for leaf in row.clip)

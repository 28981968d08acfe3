"""The clips that wait for a slot: read in a thread within a bound on their bytes, by shape and in order of arrival."""

import queue
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from avocado_jax.data.rows import Row, Shape, rounded, shape_of

SHAPE_BITS = 2  # of each size that clips are padded to: few shapes, so few programs
WAITING_BYTES = 4 * 2**30  # of clips that are read and wait for a slot


class Request(NamedTuple):
    """A clip to caption, or why it cannot be read.

    Attributes:
        item: what to return with the caption.
        number: decides the draws, with the seed.
    """

    item: Any
    row: Row | Exception
    number: int


class Arrivals:
    """Requests by the shape that their clips are padded to.

    Args:
        requests: tuples as `Request`. A sequence is taken at once, all else in a thread.
        shape: of all clips; None: each clip's sizes, rounded up.
    """

    def __init__(self, requests: Iterable[tuple[Any, Row | Exception, int]], shape: Shape | None) -> None:
        self._queue: queue.SimpleQueue = queue.SimpleQueue()
        self._shape, self._closed, self._ended = shape, threading.Event(), False
        self._error: BaseException | None = None  # of the iterable
        self._errors: list[tuple[Any, Exception]] = []
        self._waiting: dict[Shape, deque[Request]] = {}  # in the order of the oldest clip of each
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
        except BaseException as error:  # raised in the consumer's thread, behind the captions of earlier clips
            self._queue.put(error)

    def receive(self, block: bool = False) -> None:
        """Sort what has arrived; with `block`, wait for something to arrive or the end."""
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
        """Let `count` clips arrive, in at most some seconds."""
        end = time.monotonic() + seconds
        while not self._ended and self._bytes <= WAITING_BYTES and time.monotonic() < end:
            if sum(map(self.waiting, self._waiting)) >= count:
                return
            time.sleep(0.01)
            self.receive()

    def _shape_of(self, request: Request) -> Shape:
        return self._shape or rounded(shape_of(request.row.clip), SHAPE_BITS)

    def next_clip(self) -> bool:
        """Wait for a clip, an error or the end. Returns whether it is not the end. Raises the error of the iterable."""
        self.receive(block=not self._waiting)
        if self._waiting or self._errors or not self._ended:
            return True
        if self._error is not None:
            raise self._error
        return False

    def shapes(self, tokens: int | None = None) -> list[Shape]:
        """The shapes of the waiting clips of so many padded tokens (None: of all), that of the oldest first."""
        return [shape for shape in self._waiting if tokens is None or shape.tokens == tokens]

    def others(self, tokens: int) -> bool:
        """Whether clips of another number of padded tokens wait."""
        return len(self.shapes(tokens)) < len(self._waiting)

    def waiting(self, shape: Shape) -> int:
        """Number of waiting clips of a shape."""
        return len(self._waiting.get(shape, ()))

    def take(self, shape: Shape, count: int) -> list[Request]:
        """Remove the oldest clips of a shape."""
        clips = self._waiting.pop(shape, deque())
        taken = [clips.popleft() for _ in range(min(count, len(clips)))]
        if clips:  # behind the other shapes, whose oldest clips are older than most of these
            self._waiting[shape] = clips
        with self._fewer:
            self._bytes -= sum(nbytes(request.row) for request in taken)
            self._fewer.notify()
        return taken

    def put_back(self, requests: Sequence[Request]) -> None:
        """Let clips wait again."""
        for request in reversed(requests):
            self._waiting.setdefault(self._shape_of(request), deque()).appendleft(request)
        with self._fewer:
            self._bytes += sum(nbytes(request.row) for request in requests)

    def failed(self) -> list[tuple[Any, Exception]]:
        """The requests without a clip that have arrived since the last call."""
        failed, self._errors = self._errors, []
        return failed

    def close(self) -> None:
        """End the thread that reads."""
        self._closed.set()


def nbytes(row: Row) -> int:
    """Bytes of a row's arrays."""
    return sum(np.asarray(leaf).nbytes for leaf in row.clip)

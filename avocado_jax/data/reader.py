"""Read clips in child processes, so that a decoder that crashes, hangs or exhausts memory fails only one clip."""

import contextlib
import importlib
import multiprocessing
import os
import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

from avocado_jax.data import storage
from avocado_jax.data.container import Packets, printable
from avocado_jax.data.media import Media, Reading
from avocado_jax.errors import InputError


def available_cores() -> int:
    """Cores that this process may use. On platforms without CPU affinity (macOS), all cores of the machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


START_SECONDS = 300.0  # timeout for a process to import the decoder
CLIP_SECONDS = 300.0  # timeout for reading one clip
READERS = max(2, min(32, available_cores() // 2))  # clips read concurrently

T = TypeVar("T")
R = TypeVar("R")


class ClipReader:
    """Reads clips in child processes with a timeout per clip. Thread-safe.

    Processes start on demand. A process that crashes, or is killed at the timeout, is replaced.

    Args:
        processes: number of clips read concurrently.
        seconds: timeout for one clip.
    """

    def __init__(self, processes: int = 1, seconds: float = CLIP_SECONDS) -> None:
        self._seconds, self._children = seconds, set()
        self._idle: queue.LifoQueue[_Child | None] = queue.LifoQueue()
        for _ in range(processes):
            self._idle.put(None)

    def __enter__(self) -> "ClipReader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop the processes. Reads in progress raise InputError; later reads start new processes."""
        for child in list(self._children):  # including busy ones, so that no thread waits for them
            child.process.kill()
            child.process.join()

    def read(
        self,
        path: str | Path,
        reading: Reading = Reading(),
        sound: bool = True,
        part: Packets | None = None,
    ) -> Media:
        """Run `decode.read_media`. Also raises InputError if the clip exceeds the timeout or kills the process."""
        return self._call("decode.read_media", path, reading, sound, part)

    def read_parts(self, pictures: Sequence[str], sound: str | None, reading: Reading = Reading()) -> Media:
        """Run `parts.read_parts`. Raises as `read`."""
        return self._call("parts.read_parts", pictures, sound, reading)

    def segments(self, path: str | Path, target: float, longest: float) -> list[Packets]:
        """Run `segments.find_segments`. Raises as `read`."""
        return self._call("segments.find_segments", path, target, longest)

    def probe(self, path: str | Path, reading: Reading = Reading()) -> Any:
        """Run `decode.probe_media`. Raises as `read`."""
        return self._call("decode.probe_media", path, reading)

    def _call(self, function: str, path: str | Path | Sequence[str], *args: Any) -> Any:
        child, name = self._idle.get(), printable(path) if isinstance(path, str | Path) else "the clip"
        try:
            if child is None or not child.process.is_alive():
                self._children.discard(child)
                child = _Child()
                self._children.add(child)
            answer = child.call((function, path, *args), self._seconds)
        except BaseException as error:
            if child is not None:
                self._children.discard(child)
                child.process.kill()
                child.process.join()
            code = child.process.exitcode if child else None
            child = None
            if isinstance(error, TimeoutError):
                raise InputError(f"{name}: took longer than {self._seconds:g} s") from None
            if isinstance(error, EOFError | ConnectionError):
                cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
                raise InputError(f"{name}: the process that read it died ({cause})") from None
            raise
        finally:
            self._idle.put(child)
        if isinstance(answer, Exception):
            raise answer
        return answer


def read_ahead(
    items: Iterable[T], read: Callable[[T], R], threads: int = 1, depth: int = 1
) -> Iterator[tuple[T, R | Exception]]:
    """Yield each item with its result or exception, while the next `depth` items are read in threads."""

    def attempt(item: T) -> R | Exception:
        try:
            return read(item)
        except (InputError, storage.StorageError, MemoryError) as error:
            return error

    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(attempt, item)))
            if len(waiting) > depth:
                item, made = waiting.popleft()
                yield item, made.result()
        while waiting:
            item, made = waiting.popleft()
            yield item, made.result()
    finally:
        pool.shutdown(cancel_futures=True)


class _Child:
    """A child process and its pipe."""

    def __init__(self) -> None:
        # Children are forked from a server process that has imported the decoder and has no other threads.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["avocado_jax.data.decode"])
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        if not self.pipe.poll(START_SECONDS):
            self.process.kill()
            raise OSError("the process that reads clips did not start")
        self.pipe.recv()

    def call(self, message: tuple[Any, ...], seconds: float) -> Any:
        """Call a function MODULE.NAME of this package. Returns its result or its InputError.

        Raises:
            TimeoutError: the call took too long.
            EOFError, ConnectionError: the process died.
        """
        self.pipe.send(message)
        if not self.pipe.poll(seconds):
            raise TimeoutError
        return self.pipe.recv()


def _serve(pipe: Connection) -> None:
    """Answer calls until the parent exits."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # if memory runs out, the kernel kills this process and not the parent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import avocado_jax.data.decode  # noqa: F401  before the first call, which has a timeout

    with contextlib.suppress(EOFError, ConnectionError):  # the parent has closed the pipe
        pipe.send(None)
        while True:
            function, *args = pipe.recv()
            try:
                module, _, name = function.partition(".")
                answer = getattr(importlib.import_module(f"avocado_jax.data.{module}"), name)(*args)
            except InputError as error:
                answer = error
            pipe.send(answer)

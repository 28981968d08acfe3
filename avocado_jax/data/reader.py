"""Child processes that read clips: a decoder that crashes, hangs or exhausts memory fails one clip only."""

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
    """Cores that this process may use: all of the machine where the platform (macOS) does not know."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


START_SECONDS = 300.0  # for a process to import the decoder
CLIP_SECONDS = 300.0  # to read one clip
READERS = max(2, min(32, available_cores() // 2))  # clips that are read at once

T = TypeVar("T")
R = TypeVar("R")


class ClipReader:
    """Reads clips in child processes, each with a deadline. Safe to use from several threads.

    Processes start when they are first needed. One that dies, or that is killed at the deadline, is replaced.

    Args:
        processes: how many clips are read at once.
        seconds: to read one clip.
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
        """End the processes. Clips that are being read raise InputError; later ones start new processes."""
        for child in list(self._children):  # those that are reading too, so that no thread waits for them
            child.process.kill()
            child.process.join()

    def read(
        self,
        path: str | Path,
        reading: Reading = Reading(),
        sound: bool = True,
        part: Packets | None = None,
    ) -> Media:
        """`decode.read_media`. Raises InputError also for a clip that exceeds the deadline or kills its process."""
        return self._call("decode.read_media", path, reading, sound, part)

    def read_parts(self, pictures: Sequence[str], sound: str | None, reading: Reading = Reading()) -> Media:
        """`parts.read_parts`. Raises as `read`."""
        return self._call("parts.read_parts", pictures, sound, reading)

    def segments(self, path: str | Path, target: float, longest: float) -> list[Packets]:
        """`segments.find_segments`. Raises as `read`."""
        return self._call("segments.find_segments", path, target, longest)

    def probe(self, path: str | Path, reading: Reading = Reading()) -> Any:
        """`decode.probe_media`. Raises as `read`."""
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
                how = signal.Signals(-code).name if code is not None and code < 0 else f"exit status {code}"
                raise InputError(f"{name}: the process that read it died ({how})") from None
            raise
        finally:
            self._idle.put(child)
        if isinstance(answer, Exception):
            raise answer
        return answer


def read_ahead(
    items: Iterable[T], read: Callable[[T], R], threads: int = 1, depth: int = 1
) -> Iterator[tuple[T, R | Exception]]:
    """Each item and what was read of it, or why it could not be; the next `depth` are read meanwhile."""

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
    """One process and the pipe to it."""

    def __init__(self) -> None:
        # Children are forked from a clean server that has imported the decoder and has no other threads.
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
        """The result, or the InputError, of one function of this package, MODULE.NAME.

        Raises:
            TimeoutError: there is none in time.
            EOFError, ConnectionError: the process died.
        """
        self.pipe.send(message)
        if not self.pipe.poll(seconds):
            raise TimeoutError
        return self.pipe.recv()


def _serve(pipe: Connection) -> None:
    """Answer calls until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    with contextlib.suppress(OSError):  # out of memory, this process goes and not the parent
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")

    def watch() -> None:
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    import avocado_jax.data.decode  # noqa: F401  before the parent may send a clip, whose time is limited

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

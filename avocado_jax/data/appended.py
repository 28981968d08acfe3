"""Append lines to a local file or an object in a bucket. One process may append to a file.

Lines are written to a local file immediately. Lines for an object are buffered and flushed by the first append
`INTERVAL` seconds or more after the last flush, and when the exit stack is closed. A killed process loses its buffer.
"""

import os
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO

from avocado_jax.data import storage
from avocado_jax.jsonl import appending

INTERVAL = 30.0  # seconds between two appends to an object


class LocalLines:
    """A local file, locked against other processes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def append(self, line: bytes) -> None:
        """Append a line, which ends with a line feed."""
        self._file.write(line)
        self._file.flush()

    def flush(self) -> None:
        """A no-op: `append` flushes."""


class RemoteLines:
    """An object in a bucket. Thread-safe."""

    def __init__(self, path: str, size: int) -> None:
        self._path, self._size = path, size
        self._buffer, self._flushed, self._lock = bytearray(), time.monotonic(), threading.Lock()
        self._sending = 0  # bytes of a failed append, which the object may contain

    def append(self, line: bytes) -> None:
        """Append a line, which ends with a line feed."""
        with self._lock:
            self._buffer += line
        if time.monotonic() - self._flushed >= INTERVAL:
            self.flush()

    def flush(self) -> None:
        """Append the buffered lines to the object."""
        with self._lock:
            while self._buffer:
                self._sending = self._sending or len(self._buffer)
                storage.append(self._path, bytes(self._buffer[: self._sending]), self._size)
                self._size += self._sending
                del self._buffer[: self._sending]
                self._sending = 0
            self._flushed = time.monotonic()


def open_lines(
    path: str, stack: ExitStack, keep: Callable[[bytes], bytes] = lambda data: data
) -> tuple[LocalLines | RemoteLines, bytes]:
    """Open or create a file until `stack` is closed. Returns the file and its content.

    An incomplete last line, from a killed process, is removed.

    Args:
        keep: maps the content to the lines to keep.

    Raises:
        InputError: the file cannot be written, or another process appends to it.
        StorageError: storage failed.
    """
    if storage.is_remote(path):
        data = storage.read(path) if storage.exists(path) else b""
        kept = keep(data)
        if kept != data:
            storage.write(path, kept)
        lines = RemoteLines(path, len(kept))
        stack.callback(lines.flush)
        return lines, kept
    if os.path.exists(path):
        with appending(Path(path)) as file:
            file.seek(0)
            data = file.read()
            if (kept := keep(data)) != data:
                storage.write(path, kept)
    file = stack.enter_context(appending(Path(path)))
    file.seek(0)
    return LocalLines(file), file.read()

"""A remote file as a raw stream whose reads are requests of byte ranges."""

import io
from collections.abc import Callable

BLOCK = 16 * 2**20  # bytes of a request when a file is read in order


def open_ranges(size: int, fetch: Callable[[int, int], bytes]) -> io.BufferedReader:
    """A seekable reader that reads ahead by `BLOCK` bytes. Arguments as of `RangeReader`."""
    return io.BufferedReader(RangeReader(size, fetch), BLOCK)


class RangeReader(io.RawIOBase):
    """A seekable raw stream.

    Args:
        size: bytes of the file.
        fetch: (first, count) -> exactly these bytes; retries are its own.
    """

    def __init__(self, size: int, fetch: Callable[[int, int], bytes]) -> None:
        self._size, self._fetch, self._at = size, fetch, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readall(self) -> bytes:  # by default in requests of 8 KiB
        return b"".join(iter(lambda: self.read(BLOCK), b""))

    def readinto(self, buffer: bytearray | memoryview) -> int:
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        buffer[:count] = self._fetch(self._at, count)
        self._at += count
        return count

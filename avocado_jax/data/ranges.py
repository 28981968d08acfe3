"""Raw streams that read a remote file by byte ranges."""

import io
from collections.abc import Callable

BLOCK = 16 * 2**20  # bytes per request of sequential reads


def open_ranges(size: int, fetch: Callable[[int, int], bytes]) -> io.BufferedReader:
    """A seekable reader that reads ahead by `BLOCK` bytes. For the arguments see `RangeReader`."""
    return io.BufferedReader(RangeReader(size, fetch), BLOCK)


class RangeReader(io.RawIOBase):
    """A seekable raw stream.

    Args:
        size: bytes of the file.
        fetch: (first, count) -> exactly these bytes. Must retry by itself.
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

    def readall(self) -> bytes:  # the default uses requests of 8 KiB
        return b"".join(iter(lambda: self.read(BLOCK), b""))

    def readinto(self, buffer: bytearray | memoryview) -> int:
        count = min(len(buffer), self._size - self._at)
        if count <= 0:
            return 0
        buffer[:count] = self._fetch(self._at, count)
        self._at += count
        return count

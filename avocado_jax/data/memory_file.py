"""A file object that writes a download into a memory buffer."""

import io


class MemoryFile(io.BufferedIOBase):
    """Writes into a buffer allocated by the caller."""

    def __init__(self, buffer: memoryview) -> None:
        self._buffer, self._at = buffer, 0

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset
        return offset

    def truncate(self, size: int | None = None) -> int:
        return self._at

    def write(self, data: bytes) -> int:
        self._buffer[self._at : self._at + len(data)] = data
        self._at += len(data)
        return len(data)

"""Open the media of a request: data URLs, files below a root folder, and web URLs if allowed.

Readers get the path of an open descriptor, so that they read the file that was checked. Copies are unnamed temporary
files, which disappear with the process.
"""

import asyncio
import base64
import binascii
import os
import stat
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import IO
from urllib.parse import unquote_to_bytes, urlsplit

from avocado_jax.serving.download import download
from avocado_jax.serving.protocol import ApiError


class Sources:
    """Opens the media of requests.

    Args:
        root: root folder of file URLs; None: they are refused.
        remote: whether http and https URLs are allowed.
        limit: maximum bytes of a download.
        seconds: timeout of a download.
    """

    def __init__(self, root: Path | None, remote: bool, limit: int, seconds: float) -> None:
        self._root = root.resolve(strict=True) if root else None
        self._remote, self._limit, self._seconds = remote, limit, seconds

    @asynccontextmanager
    async def open(self, url: str) -> AsyncIterator[str]:
        """Context manager: the path of an open file with the content of a URL.

        Raises:
            ApiError: the URL is refused, missing or too large.
        """
        scheme = url[:8].partition(":")[0].lower()
        if scheme == "data":
            file = await asyncio.to_thread(_decode, url)
        elif scheme == "file":
            file = await asyncio.to_thread(self._local, url)
        elif is_remote(url):
            if not self._remote:
                raise ApiError(403, "http and https URLs are refused: the server runs without --allow-remote")
            file = _temporary_file()
            try:
                await download(url, file, self._limit, self._seconds)
            except BaseException:
                file.close()
                raise
        else:
            raise ApiError(400, "not a data:, file:, http: or https: URL")
        with file:
            yield descriptor_path(file)

    def _local(self, url: str) -> IO[bytes]:
        """Open the file of an absolute file URL.

        The root check uses the open descriptor, with all links resolved, so that replacing the path after the check
        has no effect.
        """
        if self._root is None:
            raise ApiError(403, "file URLs are refused: the server runs without --media-root")
        try:
            parts = urlsplit(url)
            path = os.fsdecode(unquote_to_bytes(parts.path))
        except ValueError:
            raise ApiError(400, "not a file URL") from None
        if parts.netloc not in ("", "localhost") or parts.query or parts.fragment or not path.startswith("/"):
            raise ApiError(400, "not an absolute file URL: file:///FOLDER/FILE, special characters as %XX")
        outside = ApiError(403, "the file is not below --media-root, or does not exist")  # does not reveal which
        if ".." in path.split("/") or "\0" in path:
            raise outside
        try:
            if not Path(path).resolve(strict=True).is_relative_to(self._root):
                raise outside
            # Without O_NONBLOCK, opening a pipe blocks until it has a writer.
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except (OSError, RuntimeError):  # missing, no permission, symlink loop
            raise outside from None
        opened = Path(f"/proc/self/fd/{descriptor}").resolve()
        if not opened.is_relative_to(self._root) or not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise outside
        return os.fdopen(descriptor, "rb")


def is_remote(url: str) -> bool:
    """Whether a URL is an http or https URL."""
    return url[:8].lower().startswith(("http:", "https:"))


def descriptor_path(file: IO[bytes]) -> str:
    """A path for opening an open file from other processes of this user."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def _decode(url: str) -> IO[bytes]:
    """Decode a data URL into a temporary file."""
    head, comma, data = url.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise ApiError(400, "not a data URL in base64: data:video/mp4;base64,...")
    try:
        content = base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError):
        raise ApiError(400, "the media are not valid base64") from None
    file = _temporary_file()
    try:
        file.write(content)
        file.flush()
    except OSError as error:
        file.close()
        raise ApiError(503, f"the media cannot be stored ({error.strerror})") from error
    return file


def _temporary_file() -> IO[bytes]:
    try:
        return tempfile.TemporaryFile(prefix="avocado-serve-")
    except OSError as error:
        raise ApiError(503, f"the media cannot be stored ({error.strerror})") from error

"""Files here and in Google Cloud Storage under the same few verbs; remote ones with time-outs and back-off.

Paths are strings: `gs://bucket/name` or local. `STORAGE_EMULATOR_HOST` is honoured, and where the machine has no
credentials public buckets are read without.
"""

import base64
import hashlib
import os
import queue
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from avocado_jax.errors import InputError

T = TypeVar("T")
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between bytes
PATIENCE = 120.0  # seconds of trying again before a storage error stands


class StorageError(OSError):
    """Storage did not answer, or not with what was stored, for as long as we were willing to try."""


def is_remote(path: str) -> bool:
    """Whether `path` lies in Google Cloud Storage."""
    return path.startswith("gs://")


def join(folder: str, name: str) -> str:
    """`name` as seen from `folder`; absolute and remote names stay."""
    if is_remote(name) or not folder:
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def retried(call: Callable[[], T], what: str, transient: tuple[type[BaseException], ...], patience: float) -> T:
    """Call until it works, waiting 0.1 s, 0.2 s, ... up to 10 s between tries.

    Raises:
        StorageError: it still failed after `patience` seconds.
    """
    deadline, wait = time.monotonic() + patience, 0.1
    while True:
        try:
            return call()
        except transient as error:
            if time.monotonic() + wait > deadline:
                raise StorageError(f"{what}: {_first_line(error)}") from error
            time.sleep(wait)
            wait = min(2 * wait, 10.0)


def within(seconds: float, call: Callable[[], T]) -> T:
    """Run `call` in a thread of its own, and give up on it after `seconds`.

    Decoders and storage clients may hang in C, where nothing can interrupt them: the thread is left behind.

    Raises:
        TimeoutError: it did not end in time.
    """
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:  # handed over to the caller's thread and raised there
            answer.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        value, error = answer.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"took longer than {seconds:g} s") from None
    if error is not None:
        raise error
    return value


def read(path: str) -> bytes:
    """All of a file.

    Raises:
        InputError: there is none, or it may not be read.
        StorageError: remote storage fails.
    """
    if is_remote(path):
        return _remote(path, lambda blob: blob.download_as_bytes(timeout=TIMEOUT, retry=None))
    with local_errors(path):
        return Path(path).read_bytes()


def write(path: str, data: bytes) -> None:
    """Write a file whole: it has its name only when it is complete. Raises as `read` does."""
    if is_remote(path):
        _remote(path, lambda blob: blob.upload_from_string(data, timeout=TIMEOUT, retry=None, checksum="md5"))
        return
    with local_errors(path):
        part = Path(f"{path}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)


def upload(local: Path, path: str) -> None:
    """Move a local file to `path`, which has its name only when it is complete. Raises as `read` does."""
    if is_remote(path):
        _remote(path, lambda blob: blob.upload_from_filename(local, timeout=TIMEOUT, retry=None, checksum="md5"))
        local.unlink()
        return
    with local_errors(path):
        part = Path(f"{path}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(local, part)
        os.replace(part, path)


def download(path: str, local: Path) -> None:
    """Copy a file here. Raises as `read` does."""
    if is_remote(path):
        _remote(path, lambda blob: blob.download_to_filename(local, timeout=TIMEOUT, retry=None))
        return
    with local_errors(path):
        shutil.copyfile(path, local)


def delete(path: str) -> None:
    """Remove a file, if it is there."""
    if exists(path):
        if is_remote(path):
            _remote(path, lambda blob: blob.delete(timeout=TIMEOUT, retry=None))
        else:
            Path(path).unlink()


def exists(path: str) -> bool:
    """Whether there is a file of this name."""
    if is_remote(path):
        return _remote(path, lambda blob: blob.exists(timeout=TIMEOUT, retry=None))
    return Path(path).is_file()


def sizes(folder: str) -> dict[str, int]:
    """The files that lie directly in a folder, and their bytes; none where there is no such folder."""
    if is_remote(folder):
        prefix = f"{folder.rstrip('/')}/"
        found = _remote(
            prefix,
            lambda blob: list(blob.bucket.list_blobs(prefix=blob.name, delimiter="/", timeout=TIMEOUT, retry=None)),
        )
        return {one.name.rsplit("/", 1)[-1]: one.size for one in found}
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return {path.name: path.stat().st_size for path in found if path.is_file()}


def names(folder: str) -> list[str]:
    """The names of the files that lie directly in a folder; none where there is no such folder."""
    return sorted(sizes(folder))


def fingerprint(path: str) -> str | None:
    """The MD5 sum of a file in hexadecimal, as storage knows it; None where there is no such file."""
    if is_remote(path):

        def sum_of(blob: Any) -> str | None:
            if not blob.exists(timeout=TIMEOUT, retry=None):
                return None
            blob.reload(timeout=TIMEOUT, retry=None)
            return base64.b64decode(blob.md5_hash).hex()

        return _remote(path, sum_of)
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextmanager
def here(path: str) -> Iterator[Path]:
    """A local path with the content of `path`, for readers that know no other."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, Path(path).name)
        download(path, local)
        yield local


@contextmanager
def local_errors(path: str) -> Iterator[None]:
    """A local file's troubles as one line; a full disk is storage's fault, the rest the user's."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"{path}: {error.strerror or error}") from error


@lru_cache
def _client() -> Any:
    """One client a process. Slow to import, and needed only for gs://."""
    import google.auth
    from google.api_core.client_options import ClientOptions
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        options = ClientOptions(api_endpoint=host)
        return storage.Client(project="emulator", credentials=AnonymousCredentials(), client_options=options)
    try:
        credentials, project = within(30, google.auth.default)
    except (google.auth.exceptions.GoogleAuthError, TimeoutError):
        return storage.Client.create_anonymous_client()
    return storage.Client(project=project or "none", credentials=credentials)


def _remote(path: str, call: Callable[[Any], T]) -> T:
    """`call` of the object at `path`, tried again while its failures are of the passing kind."""
    import requests
    import urllib3
    from google.api_core import exceptions
    from google.auth.exceptions import GoogleAuthError, TransportError
    from google.cloud.storage.exceptions import DataCorruption

    bucket, _, name = path.removeprefix("gs://").partition("/")
    if not bucket or not name:
        raise InputError(f"{path}: not of the form gs://bucket/name")
    passing = (
        exceptions.ServerError,
        exceptions.TooManyRequests,
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        TransportError,
        DataCorruption,
        ConnectionError,
    )
    try:
        return retried(lambda: call(_client().bucket(bucket).blob(name)), path, passing, PATIENCE)
    except exceptions.NotFound as error:
        raise InputError(f"{path}: no such object or bucket") from error
    except (exceptions.Forbidden, exceptions.Unauthorized, GoogleAuthError) as error:
        raise InputError(f"{path}: no access ({_first_line(error)})") from error
    except exceptions.GoogleAPICallError as error:
        raise StorageError(f"{path}: {_first_line(error)}") from error


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]

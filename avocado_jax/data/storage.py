"""Files on local disk and in Google Cloud Storage behind one set of functions, with timeouts and retries.

Paths are strings: `gs://bucket/name` or local. `STORAGE_EMULATOR_HOST` is honoured. A machine without credentials
reads public buckets anonymously.
"""

import base64
import errno
import hashlib
import os
import queue
import re
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
PATIENCE = 120.0  # seconds of retries before a storage error is raised
PERMISSION = re.compile(r"\bstorage\.(?:buckets|objects|folders|multipartUploads)\.\w+")  # as IAM names them
LIBRARIES = ("google", "gcsfs", "aiohttp", "requests", "urllib3")  # whose errors are storage errors
UNAVAILABLE = ("UNAVAILABLE:", "ABORTED:", "DEADLINE_EXCEEDED:")  # tensorstore, after its retries


class StorageError(OSError):
    """Storage failed, or returned other bytes than were stored, until the retries ran out. A later retry may work."""


def is_remote(path: str) -> bool:
    """Whether `path` is in Google Cloud Storage."""
    return path.startswith("gs://")


def join(folder: str, name: str) -> str:
    """`name` relative to `folder`. Absolute and remote names stay as they are."""
    if is_remote(name) or not folder:
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def retried(call: Callable[[], T], what: str, transient: tuple[type[BaseException], ...], patience: float) -> T:
    """Call until it succeeds, with waits of 0.1 s, 0.2 s, ... up to 10 s between attempts.

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
    """Run `call` in a thread of its own with a timeout.

    Decoders and storage clients may hang in C code, which nothing can interrupt. Such a thread is abandoned.

    Raises:
        TimeoutError: it did not return in time.
    """
    answer: queue.SimpleQueue = queue.SimpleQueue()

    def run() -> None:
        try:
            answer.put((call(), None))
        except BaseException as error:  # re-raised in the caller's thread
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
    """The content of a file.

    Raises:
        InputError: there is no such file, or no permission to read it.
        StorageError: storage failed.
    """
    if is_remote(path):
        return _remote(path, lambda blob: blob.download_as_bytes(timeout=TIMEOUT, retry=None))
    with local_errors(path):
        return Path(path).read_bytes()


def size(path: str) -> int:
    """The bytes of a file. Raises as `read` does."""
    if is_remote(path):

        def of(blob: Any) -> int:
            blob.reload(timeout=TIMEOUT, retry=None)
            return blob.size

        return _remote(path, of)
    with local_errors(path):
        return Path(path).stat().st_size


def read_range(path: str, first: int, count: int) -> bytes:
    """`count` bytes from byte `first` on, or as many as there are. Raises as `read` does."""
    if count <= 0:
        return b""
    if is_remote(path):
        last = first + count - 1
        return _remote(path, lambda blob: blob.download_as_bytes(None, first, last, timeout=TIMEOUT, retry=None))
    with local_errors(path), Path(path).open("rb") as file:
        file.seek(first)
        return file.read(count)


def write(path: str, data: bytes) -> None:
    """Write a file atomically: no reader sees a part of it. Raises as `read` does."""
    if is_remote(path):
        _remote(path, lambda blob: blob.upload_from_string(data, timeout=TIMEOUT, retry=None, checksum="md5"))
        return
    with local_errors(path):
        part = Path(f"{path}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)


def upload(local: Path, path: str) -> None:
    """Move a local file to `path` atomically. Raises as `read` does."""
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
    """Copy a file to a local path. Raises as `read` does."""
    if is_remote(path):
        _remote(path, lambda blob: blob.download_to_filename(local, timeout=TIMEOUT, retry=None))
        return
    with local_errors(path):
        shutil.copyfile(path, local)


def delete(path: str) -> None:
    """Remove a file if it exists. Raises as `read` does."""
    if exists(path):
        if is_remote(path):
            _remote(path, lambda blob: blob.delete(timeout=TIMEOUT, retry=None))
        else:
            Path(path).unlink()


def exists(path: str) -> bool:
    """Whether a file of this name exists. Raises as `read` does."""
    if is_remote(path):
        return _remote(path, lambda blob: blob.exists(timeout=TIMEOUT, retry=None))
    return Path(path).is_file()


def sizes(folder: str) -> dict[str, int]:
    """Names and bytes of the files directly in a folder; empty without such a folder. Raises as `read` does."""
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
    """Sorted names of the files directly in a folder. Raises as `read` does."""
    return sorted(sizes(folder))


def folders(folder: str) -> list[str]:
    """Sorted names of the folders directly in a folder. Raises as `read` does."""
    if not is_remote(folder):
        found = Path(folder).iterdir() if Path(folder).is_dir() else ()
        return sorted(path.name for path in found if path.is_dir())

    def prefixes(blob: Any) -> set[str]:
        listing = blob.bucket.list_blobs(prefix=blob.name, delimiter="/", timeout=TIMEOUT, retry=None)
        for _ in listing.pages:  # fills `prefixes`
            pass
        return listing.prefixes

    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in _remote(f"{folder.rstrip('/')}/", prefixes))


def check_bucket(path: str) -> None:
    """Read the metadata of the bucket that holds `path`: Orbax does so, and it needs a permission of its own.

    Raises:
        InputError: no such bucket, or no permission.
        StorageError: storage failed.
    """
    _remote(f"{path.rstrip('/')}/", lambda blob: blob.bucket.reload(timeout=TIMEOUT, retry=None))


def fingerprint(path: str) -> str | None:
    """The MD5 sum of a file in hexadecimal; None without such a file. Storage computes that of a remote file."""
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
    """A local path with the content of `path`, for readers of local files only."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, Path(path).name)
        download(path, local)
        yield local


@contextmanager
def local_errors(path: str) -> Iterator[None]:
    """Raise errors of a local file as one line: an InputError for a wrong path, otherwise a StorageError."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a name with a NUL character, or that no file can have
        raise InputError(f"{path}: not a file name ({error})") from error
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"{path}: {error.strerror}") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


@lru_cache
def _client() -> Any:
    """One client per process. Slow to import, and needed only for gs://."""
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
    """`call` with the object at `path`; transient errors are retried."""
    import requests
    import urllib3
    from google.api_core import exceptions
    from google.auth.exceptions import TransportError
    from google.cloud.storage.exceptions import DataCorruption

    bucket, _, name = path.removeprefix("gs://").partition("/")
    if not bucket or not name:
        raise InputError(f"{path}: not of the form gs://bucket/name")
    transient = (
        exceptions.ServerError,
        exceptions.TooManyRequests,
        requests.RequestException,
        urllib3.exceptions.HTTPError,
        TransportError,
        DataCorruption,
        ConnectionError,
    )
    try:
        return retried(lambda: call(_client().bucket(bucket).blob(name)), path, transient, PATIENCE)
    except Exception as error:
        if (failed := failure(path, error)) is None:
            raise
        raise failed from error


def failure(path: str, error: Exception) -> InputError | StorageError | None:
    """What to raise for an error of google-cloud-storage, gcsfs or tensorstore about `path` in a bucket.

    Returns:
        An InputError of one line where access is denied or an object or its bucket is missing; a StorageError where
        storage or the network failed; None for every other error.
    """
    if isinstance(error, InputError | StorageError):
        return error
    text, module = " ".join(str(error).split()), type(error).__module__
    code = str(getattr(error, "code", ""))
    if module.startswith("google.auth"):
        from google.auth.exceptions import TransportError

        denied = not isinstance(error.__cause__ or error, TransportError)
    else:  # the texts are those of gcsfs and tensorstore
        denied = code in ("401", "403") or text.startswith(("Forbidden:", "PERMISSION_DENIED:"))
    if denied:
        return InputError(_denied(path, text))
    if code == "404":
        return InputError(f"{path}: no such object or bucket")
    if module.partition(".")[0] in LIBRARIES or text.startswith(UNAVAILABLE):
        return StorageError(f"{path}: {text[:200] or type(error).__name__}")
    return None


@contextmanager
def library_errors(path: str) -> Iterator[None]:
    """Raise what `failure` makes of the errors of storage libraries about `path`; for local paths, do nothing."""
    try:
        yield
    except Exception as error:
        if not is_remote(path) or (failed := failure(path, error)) is None:
            raise
        raise failed from error


def _denied(path: str, text: str) -> str:
    """One line on a refused request: the permission that is missing, and a role that includes it."""
    if "Anonymous caller" in text:
        return f"{path}: no credentials; use a service account or `gcloud auth application-default login`"
    bucket = "/".join(path.split("/")[:3])
    if (found := PERMISSION.search(text)) is None:
        return f"{path}: no access ({text[:200]})"
    if found[0].startswith("storage.buckets."):
        role = "roles/storage.legacyBucketReader beside roles/storage.objectUser"
    elif found[0] in ("storage.objects.get", "storage.objects.list"):
        role = "roles/storage.objectViewer, or roles/storage.objectUser for the bucket of a run"
    else:
        role = "roles/storage.objectUser"
    return f"{bucket}: no {found[0]} permission; grant {role}"


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0][:200]

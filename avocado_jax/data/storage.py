"""Files on local disk and in Google Cloud Storage behind one set of functions, with timeouts and retries.

Paths are strings: `gs://bucket/name` or local. `STORAGE_EMULATOR_HOST` is supported.

All clients use Google's application default credentials (the variable GOOGLE_APPLICATION_CREDENTIALS, then `gcloud auth
application-default login`, then the metadata server): google-cloud-storage here, gcsfs and tensorstore for checkpoints
(`checkpoint.references.run_path`), and array_record for shards that are read without a copy. Without credentials they
read public buckets anonymously.

google-cloud-storage retries requests (`retries.PatientRetry`). Uploads of more than 8 MiB are sent in chunks in a
resumable session. Interrupted downloads resume at the missing bytes.
"""

import base64
import hashlib
import io
import mimetypes
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from avocado_jax.data.memory_file import MemoryFile
from avocado_jax.data.storage_errors import StorageError, failure, local_errors
from avocado_jax.data.timeouts import retried, within
from avocado_jax.errors import InputError, first_line

T = TypeVar("T")
TIMEOUT = (10.0, 60.0)  # seconds to connect, and between bytes
PATIENCE = 120.0  # seconds of failures before a storage error is raised
REQUESTS = 32  # maximum concurrent range requests of a process, and size of its connection pool
PART = 16 * 2**20  # bytes per range request
CHUNK = 16 * 2**20  # bytes per upload request, resent if the connection breaks; a multiple of 256 KiB


def is_remote(path: str) -> bool:
    """Whether `path` is in Google Cloud Storage."""
    return path.startswith("gs://")


def join(folder: str, name: str) -> str:
    """Join `name` to `folder`. Absolute and remote names are returned unchanged."""
    if is_remote(name) or not folder:
        return name
    return f"{folder.rstrip('/')}/{name}" if is_remote(folder) else str(Path(folder) / name)


def read(path: str) -> bytes:
    """Read a file.

    Raises:
        InputError: the file does not exist, or may not be read.
        StorageError: storage failed.
    """
    if is_remote(path):
        file = io.BytesIO()
        _download(path, file)
        return file.getvalue()
    with local_errors(path):
        return Path(path).read_bytes()


def size(path: str) -> int:
    """The size of a file in bytes. Raises as `read`."""
    if is_remote(path):

        def blob_size(blob: Any, options: dict[str, Any]) -> int:
            blob.reload(**options)
            return blob.size

        return _remote(path, blob_size)
    with local_errors(path):
        return Path(path).stat().st_size


def read_range(path: str, first: int, count: int) -> bytes:
    """Read `count` bytes from byte `first`, or fewer at the end of the file. Raises as `read`."""
    data = bytearray(max(count, 0))
    return bytes(data[: read_into(path, first, memoryview(data))])


def read_into(path: str, first: int, buffer: memoryview) -> int:
    """Fill a buffer from byte `first` of a file and return the number of bytes read. Raises as `read`.

    Remote files are read with concurrent requests of `PART` bytes.
    """
    if not is_remote(path):
        with local_errors(path), Path(path).open("rb") as file:
            file.seek(first)
            return file.readinto(buffer)

    def read_part(begin: int) -> int:
        part = MemoryFile(buffer[begin : begin + PART])
        with _requests:
            _download(path, part, start=first + begin, end=first + min(begin + PART, len(buffer)) - 1)
        return part.tell()

    begins = range(0, len(buffer), PART)
    if len(begins) < 2:
        return sum(map(read_part, begins))
    with ThreadPoolExecutor(len(begins)) as pool:
        return sum(pool.map(read_part, begins))


_requests = threading.BoundedSemaphore(REQUESTS)


def write(path: str, data: bytes) -> None:
    """Write a file atomically: readers never see a partial file. Raises as `read`."""
    if is_remote(path):
        _upload(path, io.BytesIO(data), len(data))
        return
    with local_errors(path):
        part = Path(f"{path}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(data)
        os.replace(part, path)


def append(path: str, data: bytes, size: int) -> None:
    """Append to an object in a bucket that has `size` bytes; 0: create it.

    A single request appends the data, so the object contains them once or not at all. Only one process may append to
    an object.

    Raises:
        InputError: access is denied.
        StorageError: storage failed, or the object has another size because another process appends to it.
    """
    from google.api_core.exceptions import GoogleAPICallError, PreconditionFailed

    def call(blob: Any, options: dict[str, Any]) -> None:
        found, part = blob.bucket.get_blob(blob.name, **options), blob.bucket.blob(f"{blob.name}.part")
        has = found.size if found else 0
        if has == size + len(data):  # the response to an earlier attempt was lost
            return
        if has != size:
            raise StorageError(f"{path}: has {has} bytes instead of {size}: another process writes to it")
        try:
            if not size:
                blob.upload_from_string(data, if_generation_match=0, **options)
                return
            part.upload_from_string(data, **options)
            # No retries by the library: a second request could append the data twice.
            sources = dict(if_source_generation_match=[found.generation, part.generation])
            blob.compose([blob, part], if_generation_match=found.generation, timeout=TIMEOUT, retry=None, **sources)
        except (GoogleAPICallError, OSError) as error:
            if not isinstance(error, PreconditionFailed) and not options["retry"]._predicate(error):
                raise
            raise _Restart(str(error)) from error

    _remote(path, call)
    if size:
        delete(f"{path}.part")


def upload(local: Path, path: str) -> None:
    """Move a local file to `path` atomically. Raises as `read`."""
    if is_remote(path):
        with local.open("rb") as file:
            _upload(path, file, local.stat().st_size)
        local.unlink()
        return
    with local_errors(path):
        part = Path(f"{path}.{os.getpid()}.part")
        part.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(local, part)
        os.replace(part, path)


def download(path: str, local: Path) -> None:
    """Copy a file to a local path. Raises as `read`."""
    if is_remote(path):
        with local.open("wb") as file:
            _download(path, file)
        return
    with local_errors(path):
        shutil.copyfile(path, local)


def delete(path: str) -> None:
    """Remove a file if it exists. Raises as `read`."""
    if is_remote(path):
        from google.cloud.exceptions import NotFound

        def remove(blob: Any, options: dict[str, Any]) -> None:
            with suppress(NotFound):  # also if the response to an earlier attempt was lost
                blob.delete(**options)

        _remote(path, remove)
    else:
        Path(path).unlink(missing_ok=True)


def exists(path: str) -> bool:
    """Whether a file exists. Raises as `read`."""
    if is_remote(path):
        return _remote(path, lambda blob, options: blob.exists(**options))
    return Path(path).is_file()


def sizes(folder: str) -> dict[str, int]:
    """Map the names of the files in a folder (not in subfolders) to bytes; empty without a folder. Raises as `read`."""
    if is_remote(folder):
        prefix = f"{folder.rstrip('/')}/"
        found = _remote(
            prefix,
            lambda blob, options: list(blob.bucket.list_blobs(prefix=blob.name, delimiter="/", **options)),
        )
        return {blob.name.rsplit("/", 1)[-1]: blob.size for blob in found}
    found = Path(folder).iterdir() if Path(folder).is_dir() else ()
    return {path.name: path.stat().st_size for path in found if path.is_file()}


class Listed(NamedTuple):
    """A file of a listing."""

    name: str  # path relative to the folder
    bytes: int
    md5: str | None  # hexadecimal; None on local disk, and for objects without a checksum


def listing(folder: str) -> list[Listed]:
    """List all files below a folder recursively, sorted by name; empty without a folder. Raises as `read`."""
    if is_remote(folder):
        prefix = f"{folder.rstrip('/')}/"
        fields = "items(name,size,md5Hash),nextPageToken"

        def pages(blob: Any, options: dict[str, Any]) -> list[Listed]:
            found = blob.bucket.list_blobs(prefix=blob.name, fields=fields, **options)
            return [
                Listed(
                    item.name[len(blob.name) :],
                    item.size,
                    base64.b64decode(item.md5_hash).hex() if item.md5_hash else None,
                )
                for item in found
            ]

        return sorted(_remote(prefix, pages))
    found = (Path(at, name) for at, _, files in os.walk(folder) for name in files)
    return sorted(Listed(os.path.relpath(path, folder), path.stat().st_size, None) for path in found if path.is_file())


def names(folder: str) -> list[str]:
    """Sorted names of the files in a folder (not in subfolders). Raises as `read`."""
    return sorted(sizes(folder))


def folders(folder: str) -> list[str]:
    """Sorted names of the folders in a folder. Raises as `read`."""
    if not is_remote(folder):
        found = Path(folder).iterdir() if Path(folder).is_dir() else ()
        return sorted(path.name for path in found if path.is_dir())

    def prefixes(blob: Any, options: dict[str, Any]) -> set[str]:
        listing = blob.bucket.list_blobs(prefix=blob.name, delimiter="/", **options)
        for _ in listing.pages:  # fills `listing.prefixes`
            pass
        return listing.prefixes

    return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in _remote(f"{folder.rstrip('/')}/", prefixes))


def check_bucket(path: str) -> None:
    """Read the metadata of the bucket of `path`, as Orbax does. This needs a separate permission.

    Raises:
        InputError: the bucket does not exist, or the permission is missing.
        StorageError: storage failed.
    """
    _remote(f"{path.rstrip('/')}/", lambda blob, options: blob.bucket.reload(**options))


def fingerprint(path: str) -> str | None:
    """The MD5 checksum of a file in hexadecimal; None if it does not exist.

    Storage provides the checksum of remote files. Composite objects (of parallel uploads) have none and are downloaded.
    """
    if is_remote(path):
        found = _remote(path, lambda blob, options: blob.bucket.get_blob(blob.name, **options))
        if found is None:
            return None
        if found.md5_hash:
            return base64.b64decode(found.md5_hash).hex()
        with local_copy(path) as local:
            return fingerprint(str(local))
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


@contextmanager
def local_copy(path: str) -> Iterator[Path]:
    """Provide the file as a local path, for readers that need one. Downloads remote files."""
    if not is_remote(path):
        yield Path(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        local = Path(folder, Path(path).name)
        download(path, local)
        yield local


@lru_cache
def _client() -> Any:
    """The client of this process. Its import is slow and needed only for gs://."""
    from requests.adapters import HTTPAdapter

    client = _connect()
    for scheme in ("http://", "https://"):
        client._http.mount(scheme, HTTPAdapter(pool_maxsize=REQUESTS))  # default 10: further connections are not reused
    return client


def _connect() -> Any:
    import google.auth
    from google.api_core.client_options import ClientOptions
    from google.auth.credentials import AnonymousCredentials
    from google.cloud import storage

    if host := os.environ.get("STORAGE_EMULATOR_HOST"):
        options = ClientOptions(api_endpoint=host)
        return storage.Client(project="emulator", credentials=AnonymousCredentials(), client_options=options)
    try:
        credentials, project = within(30, google.auth.default)
    except TimeoutError as error:
        raise StorageError(f"looking for Google credentials {error}") from error
    except google.auth.exceptions.GoogleAuthError as error:
        if named := os.environ.get("GOOGLE_APPLICATION_CREDENTIALS"):
            raise InputError(f"GOOGLE_APPLICATION_CREDENTIALS={named}: {first_line(error)}") from error
        # array_record's client would wait for credentials; with an explicit endpoint it is anonymous.
        os.environ.setdefault("CLOUD_STORAGE_EMULATOR_ENDPOINT", "https://storage.googleapis.com")
        return storage.Client.create_anonymous_client()
    return storage.Client(project=project or "none", credentials=credentials)


class _Restart(Exception):
    """A transfer must restart from the beginning."""


def _remote(path: str, call: Callable[[Any, dict[str, Any]], T]) -> T:
    """Run `call(blob, options)` with the object at `path` and request options. The library retries the requests.

    Transfers with a wrong checksum or a lost upload session are restarted.
    """
    from google.cloud.storage.exceptions import DataCorruption

    from avocado_jax.data.retries import PatientRetry

    bucket, _, name = path.removeprefix("gs://").partition("/")
    if not bucket or not (name or path.endswith("/")):
        raise InputError(f"{path}: not of the form gs://bucket/name")
    options = {"timeout": TIMEOUT, "retry": PatientRetry(PATIENCE)}
    try:
        return retried(
            lambda: call(_client().bucket(bucket).blob(name), options), path, (DataCorruption, _Restart), PATIENCE
        )
    except Exception as error:
        if (failed := failure(path, error)) is None:
            raise
        raise failed from error


def _download(path: str, file: io.BufferedIOBase, **part: int) -> None:
    """Download an object, or its bytes from `start` to `end`, into a file and replace the content of the file."""
    from avocado_jax.data.retries import PatientRetry

    def call(blob: Any, options: dict[str, Any]) -> None:
        file.seek(0)
        file.truncate()
        blob.download_to_file(file, **options | {"retry": PatientRetry(PATIENCE, file.tell)}, **part)

    _remote(path, call)


def _upload(path: str, file: io.BufferedIOBase, count: int) -> None:
    """Upload a file of `count` bytes in chunks, which are retried individually."""
    from google.api_core.exceptions import GoogleAPICallError

    def call(blob: Any, options: dict[str, Any]) -> None:
        blob.chunk_size = CHUNK
        file.seek(0)
        try:
            blob.upload_from_file(file, size=count, content_type=mimetypes.guess_type(path)[0], **options)
        except GoogleAPICallError as error:
            if error.code != 410:  # the session has ended
                raise
            raise _Restart(str(error)) from error
        except ValueError as error:  # storage has kept only a part of a chunk
            raise _Restart(str(error)) from error

    _remote(path, call)

"""Convert errors of local files and of storage libraries to exceptions with a one-line message."""

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager

from avocado_jax.errors import InputError

PERMISSION = re.compile(r"\bstorage\.(?:buckets|objects|folders|multipartUploads)\.\w+")  # IAM permissions
LIBRARIES = ("google", "gcsfs", "aiohttp", "requests", "urllib3", "http")  # errors of these are storage errors
UNAVAILABLE = ("UNAVAILABLE:", "ABORTED:", "DEADLINE_EXCEEDED:")  # errors of tensorstore after its retries


class StorageError(OSError):
    """Storage failed, or returned wrong bytes, until the retries ran out. A later retry may succeed."""


@contextmanager
def local_errors(path: str) -> Iterator[None]:
    """Convert errors of a local file: to InputError for a wrong path, otherwise to StorageError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError, PermissionError) as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except ValueError as error:  # a NUL character, or another invalid file name
        raise InputError(f"{path}: not a file name ({error})") from error
    except StorageError:
        raise
    except OSError as error:
        if error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
            raise InputError(f"{path}: {error.strerror}") from error
        raise StorageError(f"{path}: {error.strerror or error}") from error


def failure(path: str, error: Exception) -> InputError | StorageError | None:
    """Convert an error of google-cloud-storage, gcsfs or tensorstore about `path` in a bucket.

    Returns:
        An InputError if access is denied or the object or bucket is missing, a StorageError if storage or the network
        failed, None for other errors.
    """
    if isinstance(error, InputError | StorageError):
        return error
    text, module = " ".join(str(error).split()), type(error).__module__
    code = str(getattr(error, "code", ""))
    if module.startswith("google.auth"):
        from google.auth.exceptions import TransportError

        denied = not isinstance(error.__cause__ or error, TransportError)
    else:  # these prefixes are from gcsfs and tensorstore
        denied = code in ("401", "403") or text.startswith(("Forbidden:", "PERMISSION_DENIED:"))
    if denied:
        return InputError(_describe_denied(path, text))
    if code == "404":
        return InputError(f"{path}: no such object or bucket")
    if isinstance(error, ConnectionError) or module.partition(".")[0] in LIBRARIES or text.startswith(UNAVAILABLE):
        return StorageError(f"{path}: {text[:200] or type(error).__name__}")
    return None


@contextmanager
def library_errors(path: str) -> Iterator[None]:
    """Convert errors of storage libraries about `path` with `failure`. A no-op for local paths."""
    try:
        yield
    except Exception as error:
        if not path.startswith("gs://") or (failed := failure(path, error)) is None:
            raise
        raise failed from error


def _describe_denied(path: str, text: str) -> str:
    """Describe a denied request: the missing permission, and a role that includes it."""
    if "Anonymous c" in text:  # "caller" from the server, "credentials cannot be refreshed" from google-auth
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

"""Read data sets on the Hugging Face hub, `hub:ORG/NAME[@REVISION]`, by ranges; convert hub errors to one line.

Files are not stored: readers request blocks on demand. The settings of `huggingface_hub` apply (HF_ENDPOINT, HF_TOKEN).
"""

import io
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from avocado_jax.data import storage
from avocado_jax.data.ranges import open_ranges
from avocado_jax.data.timeouts import retried
from avocado_jax.errors import InputError

SOURCE = re.compile(r"hub:(?P<name>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(@(?P<revision>[^\s@]+))?")
TIMEOUT = 60.0  # seconds between bytes
BUSY = (408, 429, 500, 502, 503, 504)  # statuses to retry


class HubDataset(NamedTuple):
    """The files of a data set at one commit. Can be pickled to worker processes.

    Attributes:
        name: ORG/NAME.
        commit: the resolved commit of the revision.
        sizes: path -> bytes of each file.
    """

    name: str
    commit: str
    sizes: dict[str, int]

    def open(self, path: str) -> io.BufferedReader:
        """Open a seekable reader of a file. It reads ahead by `ranges.BLOCK` bytes and retries failed blocks.

        Raises (also when reading):
            InputError: the file does not exist, or access is denied.
            StorageError: the hub cannot be reached, or is busy.
        """
        if path not in self.sizes:
            raise InputError(f"hub:{self.name}@{self.commit}: no file '{path}'")
        where = f"hub:{self.name}@{self.commit}: {path}"

        def fetch(first: int, count: int) -> bytes:
            return retried(lambda: _range(self, path, first, count), where, (Busy,), storage.PATIENCE)

        return open_ranges(self.sizes[path], fetch)


def open_dataset(source: str) -> HubDataset:
    """Resolve `hub:ORG/NAME[@REVISION]` and list its files.

    Raises:
        InputError: `source` has another form, the data set or revision does not exist, or access is denied.
        StorageError: the hub cannot be reached, or is busy.
    """
    from huggingface_hub import HfApi, constants
    from huggingface_hub.hf_api import RepoFile

    if (found := SOURCE.fullmatch(source)) is None:
        raise InputError(f"{source}: not of the form hub:ORG/NAME or hub:ORG/NAME@REVISION")
    silence_client()
    name, api = found["name"], HfApi(endpoint=constants.ENDPOINT)

    def load() -> HubDataset:
        with hub_errors(source):
            commit = str(api.repo_info(name, repo_type="dataset", revision=found["revision"]).sha)
            tree = api.list_repo_tree(name, recursive=True, revision=commit, repo_type="dataset")
            return HubDataset(name, commit, {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)})

    return retried(load, source, (Busy,), storage.PATIENCE)


def silence_client() -> None:
    """Silence the client's messages about retries, and its progress bars unless stderr is a terminal."""
    from huggingface_hub.utils import disable_progress_bars, logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        disable_progress_bars()


def _range(dataset: HubDataset, path: str, start: int, count: int) -> bytes:
    import httpx2
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status

    url = hf_hub_url(dataset.name, path, repo_type="dataset", revision=dataset.commit)
    headers = build_hf_headers() | {
        "Range": f"bytes={start}-{start + count - 1}",
        "Accept-Encoding": "identity",
    }
    with hub_errors(f"hub:{dataset.name}@{dataset.commit}"):
        try:  # the client follows the redirect to storage without sending the token there
            response = get_session().get(url, headers=headers, timeout=TIMEOUT)
        except httpx2.ConnectError:
            raise
        except httpx2.TransportError as error:  # the connection broke
            raise Busy(str(error)) from error
        hf_raise_for_status(response)
    if len(response.content) != count:
        raise Busy(f"{len(response.content)} bytes arrived instead of {count}")
    return response.content


class Busy(storage.StorageError):
    """The hub responded with a temporary error. `retried` catches it and adds the location."""


@contextmanager
def hub_errors(reference: str) -> Iterator[None]:
    """Convert errors of `huggingface_hub` to one line: an InputError, a StorageError, or `Busy` for a retry.

    Raises:
        InputError: the model, the revision or a file does not exist, access is denied, or it is not cached offline.
        StorageError: the hub cannot be reached.
        Busy: the hub answered 429 or 5xx.
    """
    import httpx2
    from huggingface_hub import constants, errors

    try:
        yield
    except (httpx2.HTTPError, OSError, errors.HFValidationError) as error:
        if isinstance(error, storage.StorageError):
            raise
        raise _translated(reference, error, constants.ENDPOINT) from error


def _translated(reference: str, error: BaseException, endpoint: str) -> InputError | storage.StorageError:
    import httpx2
    from huggingface_hub import errors

    # The cause of "not in the cache" is the error of the hub.
    while isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        error = error.__cause__
    name = reference.partition("@")[0]
    response = getattr(error, "response", None)
    status = response.status_code if response is not None else None
    if isinstance(error, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError):
        return InputError(f"{reference}: no such folder, and not in the hub's cache (HF_HUB_OFFLINE is set)")
    if isinstance(error, errors.GatedRepoError):
        return InputError(
            f"{reference}: access is gated; accept the terms at {endpoint}/{name} and set HF_TOKEN ({status})"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return InputError(f"{reference}: {name} has no such revision ({status})")
    if isinstance(error, errors.EntryNotFoundError):
        return InputError(f"{reference}: no such file on the hub: {getattr(response, 'url', '')} ({status})")
    if isinstance(error, errors.RepositoryNotFoundError):
        return InputError(
            f"{reference}: no such folder, and no such repository on the hub, or a private one: "
            f"check the name, or set HF_TOKEN ({status})"
        )
    if status == 401:
        return InputError(f"{reference}: the hub does not accept the token (401); set HF_TOKEN to a valid one")
    if status in BUSY:
        return Busy(f"the hub is busy ({status})")
    text = " ".join(str(error).split())[:200] or type(error).__name__
    if status is not None:
        return InputError(f"{reference}: no access ({text})")
    if isinstance(error, errors.HFValidationError):
        return InputError(f"{reference}: no such folder, and not a name on the hub")
    if isinstance(error, httpx2.HTTPError | ConnectionError):
        return storage.StorageError(f"{reference}: no such folder, and the hub ({endpoint}) cannot be reached: {text}")
    return storage.StorageError(f"{reference}: {text}")  # for example a full disk

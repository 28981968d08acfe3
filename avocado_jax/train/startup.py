"""Start-up checks before the first step: every host can read its inputs and write, and all hosts run the same code.

Hosts run their checks independently and all-gather the results, so that all exit together if any check fails.
"""

import hashlib
import json
import socket
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from avocado_jax.checkpoint.references import commit_of
from avocado_jax.config import GrpoConfig, RunConfig, as_json
from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.parallel.processes import deadline

T = TypeVar("T")
REPORT_BYTES = 2048  # size of a host's report; longer than the longest error in JSON
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")
PACKAGE = Path(__file__).parents[1]


class Host(NamedTuple):
    """The report of a host."""

    name: str
    code: str  # digest of source files and package versions
    config: str  # digest of config, run folder and the commit of `init`
    error: str  # error of a failed check; empty: none
    permanent: bool  # whether a restart will fail too


class Problem(NamedTuple):
    """The reason why a job cannot start."""

    text: str
    permanent: bool  # whether a restart will fail too


def ready(config: RunConfig, folder: str, open_all: Callable[[], T]) -> T:
    """Run the start-up checks of this host and compare the results of all hosts. Returns the result of `open_all`.

    Args:
        folder: the run folder; each host creates, reads and deletes a file there.
        open_all: opens checkpoint and data on this host, without communication; its result has a `checkpoint`.

    Raises:
        InputError: a check failed on a host, or the code or config of a host differs from host 0.
        OSError: storage failed on a host.
    """
    opened, failure = None, None
    try:
        opened = open_all()
        probe(folder)
    except (InputError, OSError) as error:
        failure = error
    if jax.process_count() == 1:
        if failure:
            raise failure
        return opened
    commit = commit_of(opened.checkpoint.folder) if opened else ""  # a branch on the hub may move between two hosts
    terms = config.rewards.extra if isinstance(config, GrpoConfig) else ()
    modules = [module for _, module, *_ in (text.split(":") for text in terms if ":" in text)]
    report = Host(socket.gethostname(), code(modules), _digest([as_json(config), folder, commit]), "", False)
    if failure:
        report = report._replace(error=_short(str(failure)), permanent=isinstance(failure, InputError))
    with deadline(config.timeouts.start, f"host {jax.process_index()}: not all hosts finished the start-up checks"):
        hosts = gather(report)
    if problem := find_problem(hosts):
        raise (InputError if problem.permanent else OSError)(problem.text)
    return opened


def find_problem(hosts: list[Host]) -> Problem | None:
    """The first failed check or difference between hosts; None if they can start."""
    for number, host in enumerate(hosts):
        if host.error:
            return Problem(f"host {number} ({host.name}): {host.error}", host.permanent)
    first = hosts[0]
    for number, host in enumerate(hosts):
        pair = f"host {number} ({host.name}) and host 0 ({first.name})"
        if host.code != first.code:
            return Problem(f"{pair} run different code: install one commit, and its requirements, on all", True)
        if host.config != first.config:
            return Problem(f"{pair} were started with different configs, fields, folders or commits of init", True)
    return None


def gather(report: Host) -> list[Host]:
    """All-gather the reports of the hosts, ordered by process."""
    padded = np.frombuffer(json.dumps(report).encode().ljust(REPORT_BYTES), np.uint8)
    return [Host(*json.loads(row.tobytes())) for row in multihost_utils.process_allgather(padded)]


def code(modules: Sequence[str] = ()) -> str:
    """A digest of the source files of this package and of imported `modules`, and of dependency versions."""
    parts: list[Any] = [_version(name) for name in PACKAGES]
    for path in sorted(PACKAGE.rglob("*.py")):
        parts.append([str(path.relative_to(PACKAGE)), hashlib.sha256(path.read_bytes()).hexdigest()])
    for path in (getattr(sys.modules.get(name), "__file__", None) for name in modules):
        parts.append(path and hashlib.sha256(Path(path).read_bytes()).hexdigest())
    return _digest(parts)


def probe(folder: str) -> None:
    """Check this host's access to the run folder.

    Creates, reads, lists and deletes a file. In a bucket, also reads the bucket's metadata, as Orbax does when it lists
    steps and deletes old checkpoints.

    Raises:
        InputError: a permission is missing; the message names a role that includes it.
        StorageError: storage failed.
    """
    name = f".probe-{jax.process_index()}"
    path = storage.join(folder, name)
    content = f"{socket.gethostname()} {jax.process_index()}".encode()
    storage.write(path, content)
    if storage.read(path) != content or name not in storage.names(folder):
        raise InputError(f"{path}: its content differs from what was written; does another job use {folder}?")
    storage.delete(path)
    if storage.is_remote(folder):
        storage.check_bucket(folder)


def _short(text: str) -> str:
    """The first 600 characters of a message, in ASCII."""
    return text.encode("ascii", "replace")[:600].decode()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

"""What is seen to before the first step, on every host: that all run the same, and that each can do its part.

Every host looks for itself, and then they tell each other: what one of them lacks, all of them say and end together,
so that no host is left waiting in a step for one that has gone.
"""

import hashlib
import json
import socket
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from avocado_jax.config import RunConfig, as_json
from avocado_jax.data import storage
from avocado_jax.errors import InputError
from avocado_jax.parallel.processes import deadline

T = TypeVar("T")
TOLD_BYTES = 2048  # of what a host says: more than its longest complaint takes as JSON
PACKAGES = ("jax", "jaxlib", "libtpu", "flax", "optax", "orbax-checkpoint")
PACKAGE = Path(__file__).parents[1]


class Host(NamedTuple):
    """What a host says of itself."""

    name: str
    code: str  # digests of what it runs, and of what it was told
    config: str
    lacks: str  # what it cannot do without; empty: nothing
    for_good: bool  # whether starting again cannot help


def ready(config: RunConfig, folder: str, open_all: Callable[[], T]) -> T:
    """What `open_all` gives, once every host has found all that it needs, and all are known to run the same.

    Args:
        folder: of the run; each host writes there, reads it back and removes it.
        open_all: opens checkpoint and data on this host alone, without a word to the others.

    Raises:
        InputError: a host lacks something, or runs other code or another config than host 0.
        OSError: storage fails a host.
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
    mine = Host(socket.gethostname(), code(), _digest([as_json(config), folder]), "", False)
    if failure:
        mine = mine._replace(lacks=_short(str(failure)), for_good=isinstance(failure, InputError))
    with deadline(config.timeouts.start, f"host {jax.process_index()}: not all hosts have told whether they can begin"):
        hosts = everyone(mine)
    if complaint := disagreement(hosts):
        raise (OSError if complaint.passing else InputError)(complaint.text)
    return opened


class Complaint(NamedTuple):
    """Why a job cannot begin."""

    text: str
    passing: bool  # whether it may be otherwise next time


def disagreement(hosts: list[Host]) -> Complaint | None:
    """What keeps these hosts from beginning together; None: nothing."""
    for number, host in enumerate(hosts):
        if host.lacks:
            return Complaint(f"host {number} ({host.name}): {host.lacks}", not host.for_good)
    first = hosts[0]
    for number, host in enumerate(hosts):
        pair = f"host {number} ({host.name}) and host 0 ({first.name})"
        if host.code != first.code:
            return Complaint(f"{pair} run different code: install one commit, and its requirements, on all", False)
        if host.config != first.config:
            return Complaint(f"{pair} were started with different configs, fields or folders", False)
    return None


def everyone(mine: Host) -> list[Host]:
    """What every host says of itself, in the order of processes."""
    padded = np.frombuffer(json.dumps(mine).encode().ljust(TOLD_BYTES), np.uint8)
    return [Host(*json.loads(row.tobytes())) for row in multihost_utils.process_allgather(padded)]


def code() -> str:
    """A digest of this package's source files and of the versions of what they stand on."""
    held: list[Any] = [_version(name) for name in PACKAGES]
    for path in sorted(PACKAGE.rglob("*.py")):
        held.append([str(path.relative_to(PACKAGE)), hashlib.sha256(path.read_bytes()).hexdigest()])
    return _digest(held)


def probe(folder: str) -> None:
    """Check that this host can use the run's folder as a run does.

    It creates, reads, lists and deletes a file. In a bucket it also reads the bucket's metadata, as Orbax does when
    it lists steps and when it deletes an old checkpoint.

    Raises:
        InputError: a permission is missing; the message names a role that includes it.
        StorageError: storage failed.
    """
    name = f".probe-{jax.process_index()}"
    path = storage.join(folder, name)
    content = f"{socket.gethostname()} {jax.process_index()}".encode()
    storage.write(path, content)
    if storage.read(path) != content or name not in storage.names(folder):
        raise InputError(f"{path}: reads otherwise than it was written; does another job use {folder}?")
    storage.delete(path)
    if storage.is_remote(folder):
        storage.check_bucket(folder)


def _short(text: str) -> str:
    """At most 600 plain characters of a message."""
    return text.encode("ascii", "replace")[:600].decode()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

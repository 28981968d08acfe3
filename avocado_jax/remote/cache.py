"""Caches of raw answers, keyed by a hash of the request. Any number of processes may share a folder."""

import json
import os
import uuid
from pathlib import Path
from typing import Any, Protocol

from avocado_jax.errors import InputError


class Answers(Protocol):
    """A cache."""

    def get(self, name: str) -> dict[str, Any] | None:
        """The entry stored under a name, or None. Its "answer" is a string."""

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Store an answer: {"model", "answer", "tokens", "returned"}."""


class Cache:
    """Answers as files FOLDER/ab/abcdef....json: {"model", "answer", "tokens", "returned"}. Without a folder, a no-op.

    Raises:
        InputError: the folder is in a bucket.
    """

    def __init__(self, folder: Path | None):
        if folder is not None and folder.parts[:1] == ("gs:",):
            name = f"gs://{'/'.join(folder.parts[1:])}"
            raise InputError(f"{name}: the judge's cache must be a local folder; to keep it in a bucket, mount it")
        self.folder = folder

    def get(self, name: str) -> dict[str, Any] | None:
        """The entry stored under a name; None if the file is missing or damaged. Its "answer" is a string."""
        if self.folder is None:
            return None
        try:
            entry = json.loads(self._path(name).read_bytes())
        except (OSError, ValueError, RecursionError):
            return None
        return entry if isinstance(entry, dict) and isinstance(entry.get("answer"), str) else None

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Store an answer atomically, since other processes may read at any time.

        Raises:
            OSError: the file cannot be written.
        """
        if self.folder is None:
            return
        path = self._path(name)
        part = path.with_name(f"{uuid.uuid4().hex}.part")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            part.write_text(json.dumps(entry))
            os.replace(part, path)
        except OSError:
            part.unlink(missing_ok=True)
            raise

    def _path(self, name: str) -> Path:
        return self.folder / name[:2] / f"{name}.json"


def open_cache(cache: Path | Answers | None) -> Answers:
    """Open the cache of a folder; an open cache is returned unchanged."""
    return Cache(cache) if cache is None or isinstance(cache, Path) else cache

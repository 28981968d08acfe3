"""A cache of a judge's answers in a bucket: lines of one object, with one writing process."""

import json
import threading
from contextlib import ExitStack
from typing import Any

from avocado_jax.data.appended import open_lines
from avocado_jax.jsonl import parse_lines


class AnswerLog:
    """A cache of answers (`remote.cache.Answers`). All answers are read on opening and kept in memory.

    Args:
        path: the object. Its lines are {"key", "model", "answer", "tokens", "returned"}.
        stack: flushes pending lines when closed.

    Raises:
        InputError: the object has other lines, or access is denied.
        StorageError: storage failed.
    """

    def __init__(self, path: str, stack: ExitStack) -> None:
        self._lines, data = open_lines(path, stack)
        lines = parse_lines(data, path, {"key": str, "answer": str}) if data else ()
        self._answers = {line["key"]: line for _, line in lines}
        self._lock = threading.Lock()

    def get(self, name: str) -> dict[str, Any] | None:
        """The entry of a name; None if missing."""
        return self._answers.get(name)

    def put(self, name: str, entry: dict[str, Any]) -> None:
        """Store an answer.

        Raises:
            StorageError: the append failed; the next `put` retries it.
        """
        with self._lock:
            self._answers[name] = entry
            self._lines.append(json.dumps({"key": name, **entry}).encode() + b"\n")

"""The raw answers of a folder, appended as they arrive. A request with a stored answer is not repeated.

A line is {"key", "clip", "stage", "attempt", "answer", "calls", "tokens"}: `key` is a digest of all inputs
of the answer; the last two are the total cost of the folder. A line of the stage "end" has only the cost.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from avocado_jax.errors import InputError
from avocado_jax.jsonl import appending

FIELDS = {"key": str, "clip": str, "stage": str, "attempt": int, "answer": str, "calls": int, "tokens": int}


class Journal:
    """Answers by key; only their file offsets are in memory. Not thread-safe.

    Attributes:
        before: cost of the folder ("calls", "tokens") when it was opened.
        spent: current cost.
    """

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file = file
        self._places: dict[str, tuple[int, int]] = {}
        self._end = 0
        self.spent = {"calls": 0, "tokens": 0}
        file.seek(0)
        for number, raw in enumerate(file, start=1):
            line = _checked(raw, f"{name}:{number}")
            self._note(line, len(raw))
        self.before = dict(self.spent)

    def get(self, key: str) -> str | None:
        """The answer to a question, or None."""
        if (extent := self._places.get(key)) is None:
            return None
        first, size = extent
        return json.loads(os.pread(self._file.fileno(), size, first))["answer"]

    def put(self, key: str, clip: str, stage: str, attempt: int, answer: str, calls: int, tokens: int) -> None:
        """Append an answer. Raises OSError if the disk is full; earlier answers stay."""
        line = dict(zip(FIELDS, (key, clip, stage, attempt, answer, calls, tokens)))
        raw = json.dumps(line).encode() + b"\n"
        self._file.write(raw)
        self._file.flush()
        self._note(line, len(raw))

    def _note(self, line: dict[str, Any], size: int) -> None:
        self._places[line["key"]] = (self._end, size)
        self._end += size
        self.spent = {name: max(value, line[name]) for name, value in self.spent.items()}


def _checked(raw: bytes, where: str) -> dict[str, Any]:
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON: {error}") from None
    if not isinstance(line, dict) or not all(isinstance(line.get(name), kind) for name, kind in FIELDS.items()):
        raise InputError(f"{where}: no line of answers; --out names a folder of `avocado curate`, or a new one")
    return line


@contextmanager
def open_journal(path: Path) -> Iterator[Journal]:
    """Context manager: open the journal of a folder. A partial last line (the process was killed) is removed.

    Raises:
        InputError: the file cannot be written, is in use, or is not a journal.
    """
    with appending(path) as file:
        yield Journal(file, str(path))

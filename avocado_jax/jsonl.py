"""JSON lines: validation of input files, and appending that is robust to a killed process."""

import fcntl
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from avocado_jax.errors import InputError

NUMBER = int | float
NAMES = {str: "a string", list: "a list", dict: "an object", int: "a whole number", NUMBER: "a number"}


def read_lines(path: Path, fields: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the lines of a file as `parse_lines` does.

    Raises:
        InputError: the file cannot be read, is empty, or has an invalid line.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    yield from parse_lines(data, str(path), fields)


def read_captions(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield lines with "id" and "caption". In the output of `avocado caption`, "clip" is the id.

    Lines of failed clips are skipped.

    Raises:
        InputError: as `read_lines`.
    """
    for where, line in read_lines(path, {}):
        if isinstance(line.get("clip"), str) and "id" not in line:
            if "error" in line:
                continue
            line["id"] = line["clip"]
        for field in ("id", "caption"):
            if not isinstance(line.get(field), str):
                raise InputError(f'{where}: "{field}" must be {NAMES[str]}')
        yield where, line


def parse_lines(data: bytes, name: str, fields: Mapping[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield ("name:line", object) for each line, after checking that it has `fields` with these types.

    Raises:
        InputError: the file is empty, or a line is invalid.
    """
    lines = data.splitlines()
    if not any(map(bytes.strip, lines)):
        raise InputError(f"{name} has no lines")
    for number, raw in enumerate(lines, start=1):
        where = f"{name}:{number}"
        if not raw.strip():
            continue
        try:
            line = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON: {error}") from None
        if not isinstance(line, dict):
            raise InputError(f"{where}: not a JSON object")
        for field, kind in fields.items():
            if not isinstance(line.get(field), kind):
                raise InputError(f'{where}: "{field}" must be {NAMES[kind]}')
        yield where, line


def check_entries(where: str, line: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Check lists of objects in a line. `entries`: by list name, the field types of each object.

    Raises:
        InputError: an object has a missing or wrong field.
    """
    for name, wants in entries.items():
        for entry in line[name]:
            if not (
                isinstance(entry, dict) and all(isinstance(entry.get(field), kind) for field, kind in wants.items())
            ):
                fields = " and ".join(f'"{field}" ({NAMES[kind]})' for field, kind in wants.items())
                raise InputError(f'{where}: each of "{name}" needs {fields}')


@contextmanager
def appending(path: Path) -> Iterator[BinaryIO]:
    """Context manager: open and lock a file for reading and appending lines. A partial last line is removed.

    Raises:
        InputError: the file cannot be written, or another process has locked it.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; choose another location with --out") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise InputError(f"{path}: another run writes to it") from error
        file.seek(0)
        os.truncate(file.fileno(), sum(len(line) for line in file if line.endswith(b"\n")))
        yield file

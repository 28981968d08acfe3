"""The state of a prepared folder between runs: finished shards, existing files, and the open generation."""

import hashlib
import json
import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from avocado_jax.data import storage
from avocado_jax.data.index import FORMAT, load_columns
from avocado_jax.data.manifest import Lines, Reject, hash_name
from avocado_jax.data.media_sources import Source
from avocado_jax.errors import InputError
from avocado_jax.typing import Array

DONE = re.compile(r"parts/(?P<shard>shard-.*\.array_record)\.(?P<md5>[0-9a-f]{32}|none)\.json")
NO_CLIP = "its clip is in none of the parts"


class Base(NamedTuple):
    """The result of the finished generations."""

    doc: dict[str, Any]  # manifest.json
    ids: list[str]
    columns: dict[str, Array]
    rejects: list[Reject]
    unused: list[dict[str, str]]  # clips without a row
    complete: bool


class Folder:
    """The files of an output folder, from one listing.

    Attributes:
        files: files by name.
        made: shards that this run has written or verified.
    """

    def __init__(self, out: str) -> None:
        self.out = out
        self.made: set[str] = set()
        self.refresh()

    def refresh(self) -> None:
        """List the folder again."""
        self.files = {file.name: file for file in storage.listing(self.out)}
        self._done: dict[str, list[str]] = {}
        for name in self.files:
            if found := DONE.fullmatch(name):
                self._done.setdefault(found["shard"], []).append(found["md5"])

    def path(self, name: str) -> str:
        """The path of a file."""
        return storage.join(self.out, name)

    def read(self, name: str) -> dict[str, Any]:
        """Read a file with a JSON object."""
        try:
            content = json.loads(storage.read(self.path(name)))
        except ValueError as error:
            raise InputError(f"{self.path(name)}: not JSON: {error}") from error
        return content if isinstance(content, dict) else {}

    def lines(self, name: str) -> list[dict[str, Any]]:
        """Read a file with JSON lines; empty if the file does not exist."""
        return [json.loads(line) for line in storage.read(self.path(name)).splitlines()] if name in self.files else []

    def md5(self, name: str) -> str | None:
        """The checksum of a file, from the listing if available."""
        if name not in self.files:
            return None
        return self.files[name].md5 or storage.fingerprint(self.path(name))

    def report_of(self, shard: str) -> str | None:
        """The report file of a finished shard; None if the shard is not finished."""
        for md5 in self._done.get(shard, ()):
            if md5 == "none" or shard in self.made or self.md5(shard) == md5:
                self.made.add(shard)
                return f"parts/{shard}.{md5}.json"
        return None


def other_job(out: str) -> InputError:
    return InputError(
        f"{out}: was made of another manifest or with other options; empty it first, or write to another folder"
    )


def load_base(folder: Folder, key: str) -> Base:
    """Load the newest finished state: manifest.json, or parts/manifest.json if there were too many rejects."""
    base = Base({"generation": -1, "size": 0, "media": {}, "shards": []}, [], {"line": np.zeros(0, int)}, [], [], False)
    for name in ("manifest.json", "parts/manifest.json"):
        if name not in folder.files:
            continue
        doc = folder.read(name)
        if doc.get("version") != FORMAT or doc.get("job") != key:
            raise other_job(folder.out)
        if doc["generation"] > base.doc["generation"]:
            data = storage.read(folder.path(doc["index"]))
            if hashlib.md5(data, usedforsecurity=False).hexdigest() != doc["index_md5"]:
                raise InputError(f"{folder.path(doc['index'])}: damaged; empty {folder.out}")
            rejects = [Reject(**line) for line in folder.lines("rejects.jsonl")]
            unused = folder.lines("unused.jsonl")
            base = Base(doc, *load_columns(data, doc["index"]), rejects, unused, name == "manifest.json")
    return base


def keep_unchanged(base: Base, lines: Lines, source: Source, out: str) -> Base:
    """Update the finished state for an edited manifest: keep the records with unchanged lines, and drop the rejects.

    In an incomplete folder, records with other lines are dropped. In a complete folder, only rejected lines may change.

    Raises:
        InputError: a complete folder would lose records, no line is unchanged, or the clips are in parts.
    """
    if source.parts or "content" not in base.columns:
        raise other_job(out)
    content = base.columns["content"]
    order = np.argsort(lines.content)
    places = order[np.minimum(np.searchsorted(lines.content, content, sorter=order), len(order) - 1)]
    known = lines.content[places] == content
    if not known.all() and (base.complete or not known.any()):
        raise other_job(out)
    columns = {name: column[known] for name, column in base.columns.items()} | {"line": lines.number[places[known]]}
    ids = [base.ids[row] for row in np.flatnonzero(known).tolist()]
    return base._replace(ids=ids, columns=columns, rejects=[])


def open_generation(folder: Folder, source: Source, lines: Lines, base: Base, key: str) -> dict[str, Any]:
    """Determine the rows of the next generation, as plain data for parts/job.json.

    `rows` contains ranges of line numbers. `parts` contains pairs of a part's name and the ranges of samples to skip.
    """
    lost = [number for number, shard in enumerate(base.doc["shards"]) if _is_lost(folder, shard, base.complete)]
    kept = ~np.isin(base.columns["shard"], lost) if lost else np.ones(len(base.ids), bool)
    every = not (base.complete or source.parts)  # the user may have replaced a broken clip
    rejects = [reject for reject in base.rejects if not (reject.retry or every)]
    final = {(reject.part if source.rows_inside else "", reject.line) for reject in rejects}
    parts = []
    if source.rows_inside:
        shard_parts = np.array([shard["part"] for shard in base.doc["shards"]])
        settled = list(final)
        if len(base.ids):
            settled += zip(shard_parts[base.columns["shard"][kept]].tolist(), base.columns["line"][kept].tolist())
        again = {reject.part for reject in base.rejects if reject.retry} | {
            base.doc["shards"][number]["part"] for number in lost
        }
        for part in source.parts:
            if base.doc["media"].get(part.name) != part.bytes or part.name in again:
                parts.append([part.name, _ranges(line for name, line in settled if name == part.name)])
        rows: list[list[int]] = []
    else:
        settled_lines = np.concatenate([base.columns["line"][kept], np.array([line for _, line in final], int)])
        todo = ~np.isin(lines.number, settled_lines)
        rows = _ranges(lines.number[todo].tolist())
        if source.parts:
            wanted = _parts_of(lines, todo, base, lost)
            parts = [
                [part.name, []]
                for part in source.parts
                if base.doc["media"].get(part.name) != part.bytes or part.name in wanted
            ]
    return {
        "job": key,
        "generation": base.doc["generation"] + 1,
        "size": lines.size,
        "md5": lines.prefix_md5[lines.size],
        "rows": rows,
        "parts": parts,
        "lost": [base.doc["shards"][number]["file"] for number in lost],
    }


def _is_lost(folder: Folder, shard: dict[str, Any], complete: bool) -> bool:
    """Whether a shard is missing or damaged. Local checksums are compared only until the folder is complete."""
    found = folder.files.get(shard["file"])
    if found is None or found.bytes != shard["bytes"]:
        return True
    if found.md5 is None and complete:
        return False
    return folder.md5(shard["file"]) != shard["md5"]


def _parts_of(lines: Lines, todo: Array, base: Base, lost: list[int]) -> set[str]:
    """Parts that were read before and contain clips of rows to prepare."""
    shards = base.doc["shards"]
    absent = np.array([reject.line for reject in base.rejects if reject.reason == NO_CLIP], int)
    fresh = lines.video[todo & ~np.isin(lines.number, absent)]  # the others were not found in any part
    parts = {shards[number]["part"] for number in lost} | {reject.part for reject in base.rejects if reject.retry}
    if len(base.ids):
        used = lines.video[np.searchsorted(lines.number, base.columns["line"])]
        parts |= {shards[number]["part"] for number in np.unique(base.columns["shard"][np.isin(used, fresh)])}
    names = np.array([hash_name(clip["clip"].rpartition("/")[2]) for clip in base.unused], np.uint64)
    return parts | {base.unused[number]["part"] for number in np.flatnonzero(np.isin(names, fresh))}


def _ranges(numbers: Iterable[int]) -> list[list[int]]:
    """Convert integers to sorted ranges [first, last]."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number <= ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ranges


def contained(numbers: Array, ranges: list[list[int]]) -> Array:
    """Mask of the sorted numbers that are in one of the ranges."""
    found = np.zeros(len(numbers), bool)
    for first, last in ranges:
        found[np.searchsorted(numbers, first) : np.searchsorted(numbers, last, "right")] = True
    return found

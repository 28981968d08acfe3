"""Divide a generation into shard tasks: consecutive manifest lines, or consecutive clips of a part."""

import io
import posixpath
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from avocado_jax.data import storage
from avocado_jax.data.generation import Folder, contained
from avocado_jax.data.make_shard import Job, Row, Task, json_line
from avocado_jax.data.manifest import Lines, hash_name, parse_line
from avocado_jax.data.media_sources import CLIPS, File, Source, matches, samples
from avocado_jax.errors import InputError
from avocado_jax.typing import Array

READ = re.compile(r"parts/part-(?P<unit>\d+-\d+)-(?P<shards>\d+)\.json")


def shard_name(*numbers: int) -> str:
    """The file name of a shard from (generation, shard) or (generation, part, shard)."""
    return "shard-" + "-".join(f"{number:05d}" for number in numbers) + ".array_record"


def line_shards(opened: dict[str, Any], count: int, job: Job) -> list[str]:
    """The shard names of a generation of `count` lines."""
    return [shard_name(opened["generation"], number) for number in range(-(-count // job.shard_records))]


def line_tasks(
    folder: Folder, opened: dict[str, Any], lines: Lines, manifest: Path, job: Job, machine: int, machines: int
) -> Iterator[Task]:
    """Yield the unfinished tasks of a machine, for clips with paths."""
    chosen = np.flatnonzero(contained(lines.number, opened["rows"]))
    with manifest.open("rb") as file:
        for number, name in enumerate(line_shards(opened, len(chosen), job)):
            if number % machines == machine and folder.report_of(name) is None:
                rows = chosen[number * job.shard_records : (number + 1) * job.shard_records].tolist()
                yield Task(name, [Row(int(lines.number[row]), lines.text(file, row)) for row in rows])


def parts_read(folder: Folder) -> dict[str, tuple[str, int]]:
    """The parts that were read completely: (report file, number of shards) by `part_name`."""
    found = filter(None, map(READ.fullmatch, folder.files))
    return {match["unit"]: (match[0], int(match["shards"])) for match in found}


def part_name(opened: dict[str, Any], number: int) -> str:
    """The key of a generation's part in `parts_read`."""
    return f"{opened['generation']:05d}-{number:05d}"


def part_tasks(
    folder: Folder,
    opened: dict[str, Any],
    source: Source,
    lines: Lines,
    manifest: Path | None,
    job: Job,
    machine: int,
    machines: int,
    temporary: Path,
) -> Iterator[Task]:
    """Yield the unfinished tasks of a machine, for clips in parts. Each part is read once, on demand.

    Clips are extracted into one folder per task in `temporary`. At the end of a part, a report in parts/ lists its
    clips without a row, and the error if the part is damaged.
    """
    files, read = {part.name: part for part in source.parts}, parts_read(folder)
    for number, (name, skip) in enumerate(opened["parts"]):
        if number % machines != machine:
            continue
        _, count = read.get(part_name(opened, number), ("", -1))
        shards = [shard_name(opened["generation"], number, shard) for shard in range(max(count, 0))]
        if count >= 0 and all(map(folder.report_of, shards)):
            continue
        if name not in files:
            raise InputError(f"{name}: no such part, but the run began with it")
        with ExitStack() as stack:
            file = stack.enter_context(manifest.open("rb")) if manifest else None
            chooser = _Chooser(lines, contained(lines.number, opened["rows"]), file, skip)
            yield from _tasks_of_part(folder, opened, source, files[name], number, chooser, job, temporary)


def _tasks_of_part(
    folder: Folder,
    opened: dict[str, Any],
    source: Source,
    part: File,
    number: int,
    chooser: "_Chooser",
    job: Job,
    temporary: Path,
) -> Iterator[Task]:
    rows: list[Row] = []
    shards, damage = 0, None
    name, clips = shard_name(opened["generation"], number, 0), Path(tempfile.mkdtemp(dir=temporary))

    def wanted(sample: int, member: str) -> bool:
        return chooser.choose(sample, member) and folder.report_of(name) is None

    reading = samples(source, part, temporary, wanted)
    while True:
        try:
            sample = next(reading, None)
        except InputError as error:
            sample, damage = None, str(error)
        if sample is not None:
            extracted = sample.file and shutil.move(sample.file, clips / sample.file.name)
            rows += chooser.rows(sample, extracted)
        if len(rows) >= job.shard_records or (sample is None and rows):
            if folder.report_of(name) is None:
                yield Task(name, rows, part.name, clips)
            else:
                shutil.rmtree(clips)
            rows, shards = [], shards + 1
            name, clips = shard_name(opened["generation"], number, shards), Path(tempfile.mkdtemp(dir=temporary))
        if sample is None:
            break
    content = {"part": part.name, "bytes": part.bytes, "damage": damage, "unused": chooser.unused}
    path = f"parts/part-{part_name(opened, number)}-{shards}.json"
    storage.write(folder.path(path), json_line(content).encode())


class _Chooser:
    """Finds the rows of the clips of one part."""

    def __init__(self, lines: Lines, todo: Array, manifest: io.BufferedIOBase | None, skip: list[list[int]]) -> None:
        self._lines, self._todo, self._manifest, self._skip = lines, todo, manifest, skip
        self._order = np.argsort(lines.video, kind="stable")
        self._sorted = lines.video[self._order]
        self._taken: set[int] = set()
        self._found: tuple[int, list[tuple[int, bytes]]] = (0, [])  # (sample, its rows)
        self.unused: list[str] = []

    def choose(self, sample: int, member: str) -> bool:
        """Whether to extract a clip, because it has rows that are not prepared yet."""
        if self._manifest is None:
            return not contained(np.array([sample]), self._skip)[0]
        known = self._rows_of(member)
        found = [row for row in known if self._todo[row] and row not in self._taken]
        self._taken.update(found)
        self._found = sample, [(int(self._lines.number[row]), self._lines.text(self._manifest, row)) for row in found]
        if not known and member.lower().endswith(CLIPS):
            self.unused.append(member)
        return bool(found)

    def rows(self, sample: Any, clip: Path | None) -> list[Row]:
        """The rows of a sample."""
        if self._manifest is not None:
            number, found = self._found
            return [Row(line, text, clip) for line, text in found] if number == sample.number else []
        if sample.row is None:
            self.unused.append(sample.name)
        if sample.row is None or contained(np.array([sample.number]), self._skip)[0]:
            return []
        return [Row(sample.number, sample.row, clip, missing=not sample.clip)]

    def _rows_of(self, member: str) -> list[int]:
        """Rows whose video refers to this member: one of the paths ends with the other.

        If such rows refer to different clips, only those with exactly the member's path; possibly none.
        """
        key = np.uint64(hash_name(posixpath.basename(member)))
        first, last = np.searchsorted(self._sorted, key), np.searchsorted(self._sorted, key, "right")
        videos: dict[int, str] = {}
        for row in self._order[first:last].tolist():
            videos[row] = parse_line(self._lines.text(self._manifest, row), 1).video
        videos = {row: video for row, video in videos.items() if matches(video, member)}
        if all(matches(video, max(videos.values(), key=len)) for video in videos.values()):
            return list(videos)
        path = posixpath.normpath(member)
        return [row for row, video in videos.items() if posixpath.normpath(video) == path]

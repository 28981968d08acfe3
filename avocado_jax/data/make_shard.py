"""One shard: clips are read, checked, measured and written, in one of several worker processes."""

import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from avocado_jax.data import storage
from avocado_jax.data.container import printable
from avocado_jax.data.index import COLUMNS, measured
from avocado_jax.data.manifest import Entry, Reject, parse_line
from avocado_jax.data.media import Reading
from avocado_jax.data.media_sources import Source
from avocado_jax.data.prompt import choose_prompt
from avocado_jax.data.reader import ClipReader
from avocado_jax.data.records import Record, decoded, pack
from avocado_jax.data.timeouts import within
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError

MOST_BYTES = 1 << 30  # of a clip's file that is stored in a record
MEASURED = ("seconds", *(name for name in COLUMNS if name not in ("shard", "position")))
DENIED = (401, 403, 404)  # statuses of storage and of the hub whose cause may pass


@dataclass(frozen=True)
class Job:
    """What to prepare. The same job on the same clips gives the same bytes."""

    source: str  # as `media_sources.open_source`
    out: str  # folder, local or gs://
    features: bool = False  # store resized frames and samples instead of the files
    words: Words | None = None  # counts the texts in tokens; without it the index counts bytes
    shard_records: int = 64  # clips to a shard
    clip_seconds: float = 300.0  # to read one clip, before it is given up
    reading: Reading = field(default_factory=Reading)
    media: str | None = None  # as `media_sources.open_source`
    prompts: tuple[str, ...] = ()  # one is stored with each row that has none


class Row(NamedTuple):
    """One line to prepare."""

    number: int  # of the line, or of the sample in its part
    text: bytes
    clip: Path | None = None  # extracted from a part; None: the clip is where the line says
    missing: bool = False  # the part has a row without a clip


class Task(NamedTuple):
    """One shard to make."""

    name: str
    rows: list[Row]
    part: str = ""  # which the clips come from
    folder: Path | None = None  # of the extracted clips, deleted once the shard is made


def run_tasks(job: Job, source: Source, tasks: Iterator[Task], workers: int) -> Iterator[str]:
    """Make shards in processes; yields their names in no particular order. Tasks are taken as workers become free.

    At most `workers` + 1 tasks exist at a time: this bounds the clips that are extracted but not yet stored. When the
    caller leaves, the processes are ended.
    """
    source = source._replace(manifests=[], parts=[])  # not needed in workers
    others = set(active_children())
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _live_with_parent)
    running: dict[Future, Task] = {}
    try:
        more = True
        while running or more:
            while more and len(running) <= workers:
                if (task := next(tasks, None)) is None:
                    more = False
                else:
                    running[pool.submit(make_shard, job, source, task)] = task
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                task = running.pop(future)
                future.result()
                if task.folder:
                    shutil.rmtree(task.folder)
                yield task.name
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(active_children()) - others:
            child.terminate()


def _live_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when the parent has ended for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_shard(job: Job, source: Source, task: Task) -> None:
    """Read the clips of a task, write those that are good, and then the file that lists what was done.

    No exception of one clip ends the job. Errors of `job.out` and of the temporary folder do.
    """
    good: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    warnings: list[str] = []
    local = None if storage.is_remote(job.out) else storage.join(job.out, "parts")
    with tempfile.TemporaryDirectory(dir=local) as folder, ClipReader(seconds=job.clip_seconds) as reader:
        file = Path(folder, task.name)
        try:
            # Encoded clips do not shrink any further.
            writer = ArrayRecordWriter(str(file), f"group_size:1,{'zstd' if job.features else 'uncompressed'}")
            for row in task.rows:
                entry = parse_line(row.text, row.number)
                if isinstance(entry, Reject):
                    rejects.append(entry._replace(part=task.part))
                    continue
                if job.prompts and not entry.fields.get("prompt"):
                    entry.fields["prompt"] = choose_prompt(job.prompts, entry.fields["id"])
                try:
                    record, columns, messages = _read(job, source, entry, row, reader)
                except storage.StorageError:
                    raise
                except Exception as error:
                    reason = str(error)
                    if not isinstance(error, InputError | TimeoutError):
                        reason = f"{type(error).__name__}: {error}"
                    reason = " ".join(reason.split())
                    rejects.append(
                        Reject(entry.line, entry.fields["id"], entry.video, reason, may_pass(error), task.part)
                    )
                else:
                    writer.write(record)
                    good.append(columns | {"line": row.number})
                    warnings += [f"line {entry.line} ({entry.fields['id']}): {warning}" for warning in messages]
            writer.close()
        except RuntimeError as error:  # of the writer: a full disk above all
            raise storage.StorageError(f"{file}: {error}") from error
        made = {
            "file": task.name,
            "part": task.part,
            "bytes": file.stat().st_size,
            "md5": storage.fingerprint(str(file)) if good else "none",
            "columns": {name: [line[name] for line in good] for name in ("id", "line", *MEASURED)},
            "warnings": warnings,
            "rejects": rejects,
        }
        if good:
            storage.upload(file, storage.join(job.out, task.name))
    storage.write(storage.join(job.out, f"parts/{task.name}.{made['md5']}.json"), json_line(made).encode())


def may_pass(error: BaseException | None) -> bool:
    """Whether the cause of a clip's error may pass: a missing file, no access, a timeout, no memory."""
    while error is not None:
        if isinstance(error, FileNotFoundError | PermissionError | TimeoutError | MemoryError):
            return True
        if getattr(getattr(error, "response", None), "status_code", None) in DENIED:
            return True
        error = error.__cause__ or error.__context__
    return False


def json_line(value: dict[str, Any]) -> str:
    """A JSON object as a line; lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def _read(
    job: Job, source: Source, entry: Entry, row: Row, reader: ClipReader
) -> tuple[bytes, dict[str, Any], tuple[str, ...]]:
    """One clip as an encoded record, its columns of the index, and warnings.

    Raises:
        InputError: the clip cannot be read; the reason does not repeat its path.
        TimeoutError: its bytes did not arrive in time.
    """
    if row.missing:
        raise InputError("has no clip beside it")
    path = str(row.clip) if row.clip else storage.join(source.base, entry.video)
    name = Path(entry.video).name
    try:
        local = row.clip is not None or (source.dataset is None and not storage.is_remote(path))
        size = _local_bytes(path) if local else 0
        if size > MOST_BYTES and not job.features:
            raise InputError(
                f"{size / 2**30:.1f} GiB: the limit of a stored clip is {MOST_BYTES >> 30} GiB; use --features"
            )
        if size > MOST_BYTES:
            record, media = Record(entry.fields, b"", name), reader.read(path, job.reading)
        else:
            read = (lambda: storage.read(path)) if local else (lambda: source.read(entry.video))
            record = Record(entry.fields, within(job.clip_seconds, read), name)
            media = decoded(record, job.reading, reader.read)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ").removeprefix(f"{printable(path)}: ")) from error
    if job.features:
        record = record._replace(clip=media)
    return pack(record), measured(record, media, job.words), media.warnings


def _local_bytes(path: str) -> int:
    with storage.local_errors(path):
        return os.stat(path).st_size

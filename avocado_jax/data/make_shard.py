"""Write shards in worker processes: clips are read, checked, measured and stored."""

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

MOST_BYTES = 1 << 30  # maximum size of a clip's file that is stored in a record
MEASURED = ("seconds", *(name for name in COLUMNS if name not in ("shard", "position")))
DENIED = (401, 403, 404)  # statuses of storage and of the hub that may be temporary


@dataclass(frozen=True)
class Job:
    """Settings of `prepare`. The same job on the same clips gives the same bytes."""

    source: str  # see `media_sources.open_source`
    out: str  # folder, local or gs://
    features: bool = False  # store resized frames and samples instead of the files
    words: Words | None = None  # tokenizer for text lengths; None: the index has lengths in bytes
    shard_records: int = 64  # clips per shard
    clip_seconds: float = 300.0  # timeout for reading one clip
    reading: Reading = field(default_factory=Reading)
    media: str | None = None  # see `media_sources.open_source`
    prompts: tuple[str, ...] = ()  # one is stored with each row without a prompt


class Row(NamedTuple):
    """A line to prepare."""

    number: int  # number of the line, or of the sample in its part
    text: bytes
    clip: Path | None = None  # extracted from a part; None: at the path in the line
    missing: bool = False  # the part has no clip for the row


class Task(NamedTuple):
    """A shard to write."""

    name: str
    rows: list[Row]
    part: str = ""  # name of the part with the clips
    folder: Path | None = None  # folder of the extracted clips, deleted when the shard is finished


def run_tasks(job: Job, source: Source, tasks: Iterator[Task], workers: int) -> Iterator[str]:
    """Write shards in worker processes and yield their names in arbitrary order.

    Tasks are taken as workers become free. At most `workers` + 1 tasks exist at a time, which bounds the number of
    extracted clips. The processes are terminated when the generator is closed.
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
    """Worker initializer: ignore Ctrl-C, which the parent handles, and exit when the parent has exited."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def make_shard(job: Job, source: Source, task: Task) -> None:
    """Read the clips of a task, write the valid ones, and then write the report.

    Exceptions from single clips become rejects. Errors of `job.out` and of the temporary folder are raised.
    """
    good: list[dict[str, Any]] = []
    rejects: list[Reject] = []
    warnings: list[str] = []
    local = None if storage.is_remote(job.out) else storage.join(job.out, "parts")
    with tempfile.TemporaryDirectory(dir=local) as folder, ClipReader(seconds=job.clip_seconds) as reader:
        file = Path(folder, task.name)
        try:
            # Encoded clips cannot be compressed further.
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
        except RuntimeError as error:  # raised by the writer, mostly for a full disk
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
    """Whether an error may be temporary: a missing file, denied access, a timeout, or lack of memory."""
    while error is not None:
        if isinstance(error, FileNotFoundError | PermissionError | TimeoutError | MemoryError):
            return True
        if getattr(getattr(error, "response", None), "status_code", None) in DENIED:
            return True
        error = error.__cause__ or error.__context__
    return False


def json_line(value: dict[str, Any]) -> str:
    """Encode a JSON object as a line. Lone surrogates are escaped."""
    text = json.dumps(value, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()


def _read(
    job: Job, source: Source, entry: Entry, row: Row, reader: ClipReader
) -> tuple[bytes, dict[str, Any], tuple[str, ...]]:
    """Read one clip: the encoded record, its index columns, and warnings.

    Raises:
        InputError: the clip cannot be read. The message does not repeat its path.
        TimeoutError: reading the bytes took too long.
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

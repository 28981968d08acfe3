"""Manifest to shards: clips are read once, checked, measured and written as ArrayRecord files with an index.

A shard is a fixed stretch of the manifest's good lines and is made by one process. When it is in its place, a part
file says so with its checksum; a run that starts again skips the shards whose parts hold. manifest.json is
written last: a folder that has it is complete.
"""

import hashlib
import json
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path
from typing import Any, NamedTuple

from array_record.python.array_record_module import ArrayRecordWriter

from avocado_jax.data import storage
from avocado_jax.data.container import printable
from avocado_jax.data.index import measured
from avocado_jax.data.manifest import Entry, Reject, parse_manifest
from avocado_jax.data.media import Reading, reading_fields
from avocado_jax.data.reader import ClipReader
from avocado_jax.data.records import VERSION, Record, decoded, pack
from avocado_jax.data.words import Words
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

MOST_BYTES = 1 << 30  # of a clip's file that is stored in a record


@dataclass(frozen=True)
class Job:
    """What to prepare. The same job on the same clips gives the same bytes."""

    manifest: str  # JSONL, local or gs://
    out: str  # folder, local or gs://
    features: bool = False  # store resized frames and samples instead of the files
    words: Words | None = None  # counts the texts in tokens; without it the index counts bytes
    shard_records: int = 64  # manifest lines to a shard
    clip_seconds: float = 300.0  # to read one clip, before it is given up
    reading: Reading = field(default_factory=Reading)


class Prepared(NamedTuple):
    """What came of a job."""

    records: int
    shards: int
    bytes: int
    rejects: list[Reject]
    complete: bool  # False: too many rejects, the folder cannot be used
    warnings: Sequence[str] = ()  # of clips that were kept; only from the run that completes the folder


def prepare(job: Job, workers: int, max_reject_share: float = 0.05) -> Prepared:
    """Run a job in `workers` processes, or go on where it stopped.

    Past `max_reject_share` of the lines the folder is not completed, and running again with a larger share is quick.

    Raises:
        InputError: the manifest cannot be read or is empty, or `out` holds something else.
        StorageError: storage failed, or the disk is full; what is done stays done.
        BrokenProcessPool: a process was killed; what is done stays done.
    """
    text = storage.read(job.manifest)
    entries, rejects = parse_manifest(text)
    if not entries and not rejects:
        raise InputError(f"{job.manifest}: has no lines")
    key = _sum(
        [VERSION, _sum(text.hex()), job.features, job.shard_records, reading_fields(job.reading), asdict(job)["words"]]
    )
    warnings: list[str] = []
    if not _claimed(job.out, key):
        cuts = [entries[first : first + job.shard_records] for first in range(0, len(entries), job.shard_records)]
        names = [f"shard-{number:05d}-of-{len(cuts):05d}.array_record" for number in range(len(cuts))]
        todo = [(job, name, cut) for name, cut in zip(names, cuts) if not _done(job.out, name)]
        for _ in progress(_parallel(todo, workers), f"prepare {job.out}: shards", len(todo)):
            pass
        parts = [json.loads(storage.read(_part(job.out, name))) for name in names]
        rejects += [Reject(*reject) for part in parts for reject in part["rejects"]]
        rejects.sort(key=lambda reject: reject.line)
        said = "".join(_line(reject._asdict()) for reject in rejects)
        storage.write(storage.join(job.out, "rejects.jsonl"), said.encode())
        good = sum(len(part["entries"]) for part in parts)
        warnings = [warning for part in parts for warning in part.get("warnings", ())]
        if len(rejects) > max_reject_share * (good + len(rejects)):
            return Prepared(good, len(parts), 0, rejects, False, warnings)
        _complete(job, key, parts, len(rejects))
    held = json.loads(storage.read(storage.join(job.out, "manifest.json")))
    lines = storage.read(storage.join(job.out, "rejects.jsonl")).splitlines()
    size = sum(shard["bytes"] for shard in held["shards"])
    return Prepared(
        held["records"], len(held["shards"]), size, [Reject(**json.loads(line)) for line in lines], True, warnings
    )


def _claimed(out: str, key: str) -> bool:
    """Mark `out` as this job's. Returns whether the job is complete.

    Raises:
        InputError: it is another job's.
    """
    for name in ("manifest.json", "parts/job.json"):
        path = storage.join(out, name)
        if storage.exists(path):
            try:
                same = json.loads(storage.read(path))["job"] == key
            except (ValueError, KeyError, TypeError):
                same = False
            if not same:
                raise InputError(f"{out}: was made of another manifest or with other options; empty it first")
            if name == "manifest.json":
                return True
    storage.write(storage.join(out, "parts/job.json"), _line({"job": key}).encode())
    return False


def _part(out: str, name: str) -> str:
    """The file that says a shard is done, and what is in it."""
    return storage.join(out, f"parts/{name}.json")


def _done(out: str, name: str) -> bool:
    """Whether a shard is in its place, whole."""
    if not storage.exists(_part(out, name)):
        return False
    part = json.loads(storage.read(_part(out, name)))
    return part["md5"] == storage.fingerprint(storage.join(out, name)) or not part["entries"]


def _parallel(tasks: list[tuple[Job, str, list[Entry]]], workers: int) -> Iterator[None]:
    """Make shards in processes, in no particular order; when the caller leaves, they are ended."""
    others = set(active_children())
    pool = ProcessPoolExecutor(min(workers, len(tasks)) or 1, get_context("spawn"), _live_with_parent)
    try:
        for future in as_completed([pool.submit(_make_shard, *task) for task in tasks]):
            yield future.result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for child in set(active_children()) - others:
            child.terminate()


def _live_with_parent() -> None:
    """In a worker: leave Ctrl-C to the parent, and end when it is gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _make_shard(job: Job, name: str, entries: list[Entry]) -> None:
    """Read the clips of a stretch of lines, write those that are good, and say what was done."""
    good, rejects, warnings = [], [], []
    local = None if storage.is_remote(job.out) else storage.join(job.out, "parts")
    with tempfile.TemporaryDirectory(dir=local) as folder, ClipReader(seconds=job.clip_seconds) as reader:
        file = Path(folder, name)
        try:
            # Encoded clips do not shrink any further.
            writer = ArrayRecordWriter(str(file), f"group_size:1,{'zstd' if job.features else 'uncompressed'}")
            for entry in entries:
                try:
                    record, index, messages = _read(job, entry, reader)
                except (InputError, TimeoutError) as error:
                    rejects.append(Reject(entry.line, entry.fields["id"], entry.video, str(error)))
                else:
                    writer.write(record)
                    good.append(index)
                    warnings += [f"line {entry.line} ({entry.fields['id']}): {warning}" for warning in messages]
            writer.close()
        except RuntimeError as error:  # of the writer: a full disk above all
            raise storage.StorageError(f"{file}: {error}") from error
        part = {
            "bytes": file.stat().st_size,
            "md5": storage.fingerprint(str(file)),
            "entries": good,
            "warnings": warnings,
        }
        if good:
            storage.upload(file, storage.join(job.out, name))
    storage.write(_part(job.out, name), _line({"file": name, **part, "rejects": rejects}).encode())


def _read(job: Job, entry: Entry, reader: ClipReader) -> tuple[bytes, dict[str, Any], tuple[str, ...]]:
    """One clip as an encoded record, its index line, and warnings.

    Raises:
        InputError: the clip cannot be read; the reason does not repeat its path.
        TimeoutError: its bytes did not come in time.
    """
    path = storage.join(os.path.dirname(job.manifest), entry.video)
    name = Path(entry.video).name
    try:
        size = 0 if storage.is_remote(path) else _local_bytes(path)
        if size > MOST_BYTES and not job.features:
            raise InputError(f"{size / 2**30:.1f} GiB: {MOST_BYTES >> 30} GiB are stored at most, or use --features")
        if size > MOST_BYTES:
            record, media = Record(entry.fields, b"", name), reader.read(path, job.reading)
        else:
            record = Record(entry.fields, storage.within(job.clip_seconds, lambda: storage.read(path)), name)
            media = decoded(record, job.reading, reader.read)
    except InputError as error:
        raise InputError(str(error).removeprefix(f"{path}: ").removeprefix(f"{printable(path)}: ")) from error
    if job.features:
        record = record._replace(clip=media)
    return pack(record), measured(record, media, job.words), media.warnings


def _local_bytes(path: str) -> int:
    with storage.local_errors(path):
        return os.stat(path).st_size


def _complete(job: Job, key: str, parts: list[dict[str, Any]], rejected: int) -> None:
    """Write the index and, last of all, manifest.json; then the parts may go."""
    kept = [part for part in parts if part["entries"]]
    index = "".join(
        _line({**entry, "shard": number, "position": position})
        for number, part in enumerate(kept)
        for position, entry in enumerate(part["entries"])
    ).encode()
    storage.write(storage.join(job.out, "index.jsonl"), index)
    shards = [
        {**{name: part[name] for name in ("file", "bytes", "md5")}, "records": len(part["entries"])} for part in kept
    ]
    manifest = {
        "version": VERSION,
        "job": key,
        "records": sum(shard["records"] for shard in shards),
        "rejected": rejected,
        "features": job.features,
        "text_unit": "token" if job.words else "byte",
        "reading": reading_fields(job.reading),
        "index_md5": hashlib.md5(index, usedforsecurity=False).hexdigest(),
        "shards": shards,
    }
    storage.write(storage.join(job.out, "manifest.json"), (json.dumps(manifest, indent=1) + "\n").encode())
    if storage.is_remote(job.out):
        for part in parts:
            storage.delete(_part(job.out, part["file"]))
        storage.delete(storage.join(job.out, "parts/job.json"))
    else:
        shutil.rmtree(storage.join(job.out, "parts"))


def _line(held: dict[str, Any]) -> str:
    text = json.dumps(held, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()  # half of a surrogate pair is escaped, as JSON does


def _sum(held: Any) -> str:
    return hashlib.md5(json.dumps(held).encode(), usedforsecurity=False).hexdigest()

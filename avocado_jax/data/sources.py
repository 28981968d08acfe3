"""Random access to records: shards written by `prepare`, local or in a bucket, and tfds data sets."""

import fcntl
import hashlib
import json
import os
import threading
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from avocado_jax.data import storage
from avocado_jax.data.index import COLUMNS, FORMAT, Index, dump_index, load_index, measured
from avocado_jax.data.media import Reading, reading_fields
from avocado_jax.data.records import Record, decoded, from_example, unpack
from avocado_jax.data.timeouts import retried, within
from avocado_jax.errors import InputError
from avocado_jax.progress import progress

OPEN_SHARDS = 128  # readers kept open in a process


class Shard(NamedTuple):
    """An entry of manifest.json: one file of records."""

    file: str
    records: int
    bytes: int
    md5: str


class Shards:
    """Records of a prepared folder. Thread-safe, and can be pickled to other processes.

    Attributes:
        index: location and sizes of each record.
    """

    def __init__(self, folder: str, shards: list[Shard], index: Index, cache_dir: Path | None, patience: float) -> None:
        self.index, self._folder, self._shards = index, folder, shards
        self._cache, self._patience = cache_dir, patience
        self._forget()

    def _forget(self) -> None:
        self._readers: OrderedDict[int, Any] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key not in ("_readers", "_lock")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._forget()

    def __len__(self) -> int:
        return len(self.index.ids)

    def __getitem__(self, number: int) -> Record:
        """Read the record with this index.

        Raises:
            InputError: the record is damaged, or does not match the index.
            StorageError: storage failed until the retries ran out.
        """
        shard, position = int(self.index.shard[number]), int(self.index.position[number])
        record = unpack(retried(lambda: self._read(shard, position), self._name(shard), FAULTS, self._patience))
        if record.fields["id"] != self.index.ids[number]:
            raise InputError(f"{self._name(shard)} has {record.fields['id']} at {position}, unlike the index")
        return record

    def check(self) -> None:
        """Check that all shards exist and have the right size.

        Raises:
            InputError: a shard is missing, or its size differs from manifest.json.
            StorageError: storage failed.
        """
        sizes = storage.sizes(self._folder)
        for shard in self._shards:
            if (size := sizes.get(shard.file)) != shard.bytes:
                found = "is missing" if size is None else f"has {size} bytes, where manifest.json says {shard.bytes}"
                raise InputError(f"{storage.join(self._folder, shard.file)}: {found}")

    def _name(self, shard: int) -> str:
        return storage.join(self._folder, self._shards[shard].file)

    def _read(self, shard: int, position: int) -> bytes:
        reader = self._reader(shard)
        try:
            data = reader.read([position])[0]
            if not data:  # the reader returns this for truncated files
                raise storage.StorageError("reads as empty")
        except FAULTS:
            with self._lock:  # a reader does not recover from a failure
                self._readers.pop(shard, None)
            raise
        return data

    def _reader(self, shard: int) -> Any:
        """The reader of a shard. Checks the number of records, because a missing object opens as an empty one."""
        with self._lock:
            if shard in self._readers:
                self._readers.move_to_end(shard)
                return self._readers[shard]
        entry, path = self._shards[shard], self._name(shard)
        if self._cache and storage.is_remote(path):
            path = str(cached(path, entry, self._cache))
        reader = within(self._patience, lambda: ArrayRecordReader(path, "readahead_buffer_size:0"))
        if (found := reader.num_records()) != entry.records:
            raise storage.StorageError(f"{found} records, where manifest.json says {entry.records}")
        with self._lock:
            self._readers[shard] = reader
            while len(self._readers) > OPEN_SHARDS:
                self._readers.popitem(last=False)
        return reader


# Exceptions of array_record for missing or wrong bytes. TimeoutError is an OSError.
FAULTS = (OSError, RuntimeError, ValueError)


def prepared_reading(folder: str) -> Reading:
    """The reading with which a folder was prepared. Raises as `open_shards`."""
    where = storage.join(folder, "manifest.json")
    try:
        return Reading(**json.loads(storage.read(where))["reading"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not what `prepare` writes ({error})") from error


def open_shards(
    folder: str, reading: Reading, cache_dir: Path | None = None, patience: float = storage.PATIENCE
) -> Shards:
    """Open a folder written by `prepare`, local or gs://.

    Args:
        reading: how clips are sampled. The index is valid for one reading only.
        cache_dir: cache the shards of a bucket here. They are downloaded at first use and verified by checksum.
        patience: seconds of retries before a storage error is raised.

    Raises:
        InputError: the folder is not prepared, not finished, or prepared with another reading.
        StorageError: storage failed.
    """
    where = storage.join(folder, "manifest.json")
    try:
        manifest = json.loads(storage.read(where))
        version = manifest["version"]
        if version == FORMAT:
            shards = [Shard(*(shard[name] for name in Shard._fields)) for shard in manifest["shards"]]
            prepared, unit, file, md5 = (manifest[name] for name in ("reading", "text_unit", "index", "index_md5"))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not what `prepare` writes ({error})") from error
    if version != FORMAT:
        raise InputError(
            f"{where}: version {version}; this code reads {FORMAT}: run prepare again into an empty folder"
        )
    if prepared != reading_fields(reading):
        requested = reading_fields(reading)
        raise InputError(f"{where}: prepared for {prepared}, the run requires {requested}: run prepare again")
    data = storage.read(storage.join(folder, file))
    if hashlib.md5(data, usedforsecurity=False).hexdigest() != md5:
        raise InputError(f"{folder}: {file} is not the one of its manifest.json")
    index = load_index(data, unit, folder)
    counts = np.array([shard.records for shard in shards])  # may exceed the indexed records: duplicates are excluded
    if len(index.ids) != manifest["records"] or (len(index.ids) and not (index.position < counts[index.shard]).all()):
        raise InputError(f"{folder}: {file} does not match the shards of its manifest.json")
    return Shards(folder, shards, index, cache_dir, patience)


def cached(path: str, shard: Shard, folder: Path) -> Path:
    """Cache a shard in `folder`. One process downloads it while the other processes of this host wait.

    Raises:
        StorageError: the checksum differs from manifest.json.
    """
    local = folder / f"{shard.md5}-{shard.file}"
    if not local.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / f"{local.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not local.exists():
                part = folder / f"{local.name}.part"
                storage.download(path, part)
                if storage.fingerprint(str(part)) != shard.md5:
                    part.unlink()
                    raise storage.StorageError("its checksum is not that of manifest.json")
                part.rename(local)
    return local


class TfdsSource:
    """Records of a tfds data set in array_record format. Its examples have the fields of a manifest line.

    Texts are bytes, lists are JSON texts, `video` contains the bytes of the file.
    """

    def __init__(self, folder: str, split: str, index: Index | None) -> None:
        self.index, self._folder, self._split = index, folder, split
        self._source: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_source": None}

    def __len__(self) -> int:
        return len(self._examples())

    def __getitem__(self, number: int) -> Record:
        """Read the record with this index. Raises as `Shards`."""
        where = f"{self._folder} ({self._split}) at {number}"
        record = from_example(retried(lambda: self._read(number), where, FAULTS, storage.PATIENCE))
        if self.index and record.fields["id"] != self.index.ids[number]:
            raise InputError(f"{where} has {record.fields['id']}, unlike its measurements; empty the cache_dir")
        return record

    def _read(self, number: int) -> dict[str, Any]:
        try:
            return self._examples()[number]
        except FAULTS:
            self._source = None  # its readers do not recover from a failure
            raise

    def _examples(self) -> Any:
        if self._source is None:
            # tfds reads small files of a bucket with gcsfs, which by default waits minutes for a probe.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            import tensorflow_datasets as tfds  # slow to import

            self._source = tfds.builder_from_directory(self._folder).as_data_source(self._split)
        return self._source


def open_tfds(folder: str, split: str, reading: Reading, cache_dir: Path) -> TfdsSource:
    """Open the version folder of a tfds data set, local or gs://. Its clips are measured once; `cache_dir` caches this.

    Raises:
        InputError: the data set does not exist, an example has missing fields, or its clip cannot be read.
    """
    source = TfdsSource(folder, split, None)
    if not storage.exists(storage.join(folder, "dataset_info.json")):
        raise InputError(f"{folder}: not a tfds data set (it has no dataset_info.json)")
    key = json.dumps([folder, split, len(source), reading_fields(reading)])
    kept = cache_dir / f"index-{hashlib.md5(key.encode(), usedforsecurity=False).hexdigest()}.npz"
    if not kept.exists():
        lines = []
        for number in progress(range(len(source)), f"measure {folder}"):
            record = source[number]
            lines.append(measured(record, decoded(record, reading)) | {"shard": 0, "position": number})
        columns = {name: [line[name] for line in lines] for name in ("seconds", *COLUMNS)}
        storage.write(str(kept), dump_index([line["id"] for line in lines], columns))
    return TfdsSource(folder, split, load_index(kept.read_bytes(), "byte", str(kept)))

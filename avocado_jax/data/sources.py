"""Random access to records: shards made by `prepare`, local or in a bucket, and tfds data sets."""

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
    """One file of records, as manifest.json describes it."""

    file: str
    records: int
    bytes: int
    md5: str


class Shards:
    """Records of a prepared folder. Reads from any number of threads and, pickled, from other processes.

    Attributes:
        index: what the batch plan needs to know of each record.
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
        """The record of this number in the index.

        Raises:
            InputError: it is damaged, or not the one that the index names.
            StorageError: storage failed for as long as we were willing to try.
        """
        shard, position = int(self.index.shard[number]), int(self.index.position[number])
        record = unpack(retried(lambda: self._read(shard, position), self._name(shard), FAULTS, self._patience))
        if record.fields["id"] != self.index.ids[number]:
            raise InputError(f"{self._name(shard)} has {record.fields['id']} at {position}, unlike the index")
        return record

    def check(self) -> None:
        """See that every shard is there, whole.

        Raises:
            InputError: one is missing, or has another size than manifest.json says.
            StorageError: storage fails.
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
            if not data:  # what a reader gives whose file is cut short
                raise storage.StorageError("reads as empty")
        except FAULTS:
            with self._lock:  # a reader that failed once stays broken
                self._readers.pop(shard, None)
            raise
        return data

    def _reader(self, shard: int) -> Any:
        """The reader of a shard; its count is checked, since a missing object opens as one of no records."""
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


# What array_record raises when bytes do not come, or come wrong; TimeoutError is an OSError.
FAULTS = (OSError, RuntimeError, ValueError)


def prepared_reading(folder: str) -> Reading:
    """How the clips of a prepared folder were sampled. Raises as `open_shards`."""
    where = storage.join(folder, "manifest.json")
    try:
        return Reading(**json.loads(storage.read(where))["reading"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{where}: not what `prepare` writes ({error})") from error


def open_shards(
    folder: str, reading: Reading, cache_dir: Path | None = None, patience: float = storage.PATIENCE
) -> Shards:
    """A folder that `prepare` made, local or gs://.

    Args:
        reading: how clips are sampled: the index holds for one way only.
        cache_dir: keep whole shards of a bucket here, fetched at first use and checked against their sums.
        patience: seconds of trying again before a storage error stands.

    Raises:
        InputError: it is not a prepared folder, not finished, or prepared for another reading.
        StorageError: storage fails.
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
    counts = np.array([shard.records for shard in shards])  # may exceed what is indexed: duplicates are left out
    if len(index.ids) != manifest["records"] or (len(index.ids) and not (index.position < counts[index.shard]).all()):
        raise InputError(f"{folder}: {file} does not match the shards of its manifest.json")
    return Shards(folder, shards, index, cache_dir, patience)


def cached(path: str, shard: Shard, folder: Path) -> Path:
    """A copy of a shard in `folder`, fetched by one process while the others of this host wait.

    Raises:
        StorageError: what came is not what manifest.json says.
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
    """Records of a tfds data set in array_record format, whose examples carry a manifest line's fields.

    Texts are bytes, lists JSON texts, `video` the file's bytes.
    """

    def __init__(self, folder: str, split: str, index: Index | None) -> None:
        self.index, self._folder, self._split = index, folder, split
        self._source: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_source": None}

    def __len__(self) -> int:
        return len(self._examples())

    def __getitem__(self, number: int) -> Record:
        """The record of this number in the index. Raises as `Shards` does."""
        where = f"{self._folder} ({self._split}) at {number}"
        record = from_example(retried(lambda: self._read(number), where, FAULTS, storage.PATIENCE))
        if self.index and record.fields["id"] != self.index.ids[number]:
            raise InputError(f"{where} has {record.fields['id']}, unlike its measurements; empty the cache_dir")
        return record

    def _read(self, number: int) -> dict[str, Any]:
        try:
            return self._examples()[number]
        except FAULTS:
            self._source = None  # its readers stay broken once they failed
            raise

    def _examples(self) -> Any:
        if self._source is None:
            # tfds reads small files of a bucket by gcsfs, which waits on a probe for minutes by default.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
            import tensorflow_datasets as tfds  # slow to import

            self._source = tfds.builder_from_directory(self._folder).as_data_source(self._split)
        return self._source


def open_tfds(folder: str, split: str, reading: Reading, cache_dir: Path) -> TfdsSource:
    """A tfds data set by the folder of its version, local or gs://. Its clips are measured once, into `cache_dir`.

    Raises:
        InputError: there is no such data set, an example lacks fields, or its clip cannot be read.
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

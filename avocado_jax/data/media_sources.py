"""Sources of manifests and clips: files on disk, in a bucket or on the hub; tar and Parquet parts as streams.

A part is read once, in order, and its clips are extracted one at a time. Parts are never unpacked completely.
"""

import fnmatch
import gzip
import io
import json
import os
import posixpath
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from avocado_jax.data import storage
from avocado_jax.data.hub import HubDataset, open_dataset
from avocado_jax.data.ranges import open_ranges
from avocado_jax.errors import InputError

TAR, PARQUET = (".tar", ".tar.gz", ".tgz"), (".parquet",)
CLIPS = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".ts", ".mpg", ".mpeg", ".flv", ".wmv", ".3gp")
DAMAGE = (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile, ValueError)  # raised for truncated parts
ROW_TEXT = 16 * 2**20  # bytes of a .json or .txt file beside a clip


class File(NamedTuple):
    """A file of a source. Can be pickled to worker processes."""

    name: str  # path in the source: the same on disk, in a bucket and on the hub
    path: str
    bytes: int
    dataset: HubDataset | None = None  # data set of `path`, for files on the hub

    def open(self) -> io.BufferedReader:
        """Open a seekable reader. Opening and reading raise as `storage.read`."""
        if self.dataset:
            return self.dataset.open(self.path)
        if storage.is_remote(self.path):
            return open_ranges(self.bytes, partial(storage.read_range, self.path))
        with storage.local_errors(self.path):
            return Path(self.path).open("rb")


class Source(NamedTuple):
    """The input of `prepare`.

    Attributes:
        manifests: JSONL files, or Parquet files with paths of clips; concatenated.
        parts: tar or Parquet files with the clips, read as streams.
        rows_inside: whether the parts contain the rows too: WebDataset, or Parquet with the clips' bytes.
        base: without parts, the folder of relative clip paths.
        dataset: the data set of `base`, for folders on the hub.
        listed: whether to report clips without a row, because the media folder was given.
    """

    manifests: list[File]
    parts: list[File]
    rows_inside: bool
    base: str
    dataset: HubDataset | None
    listed: bool

    def key(self, video: str) -> str:
        """The key of a clip: its file name in parts (`matches` compares the rest), else its path."""
        return posixpath.basename(video) if self.parts else posixpath.normpath(storage.join(self.base, video))

    def read(self, video: str) -> bytes:
        """Read a clip that is not in a part. Raises as `storage.read`."""
        if self.dataset:
            path = posixpath.normpath(posixpath.join(self.base, video))
            if path not in self.dataset.sizes:
                raise InputError("no such file in the data set") from FileNotFoundError(path)
            return self.dataset.open(path).read()
        return storage.read(storage.join(self.base, video))


class Sample(NamedTuple):
    """A clip of a part, or a row without a clip."""

    number: int  # from 1
    name: str  # path in the part
    file: Path | None  # the extracted clip; None if not wanted or missing
    row: bytes | None  # the manifest line in the part
    clip: bool = True  # False for a row without a clip


def open_source(source: str, media: str | None) -> Source:
    """Find the manifests and clips of a source.

    Args:
        source: a JSONL file, tar (WebDataset) or Parquet files: a path, a folder or a glob, local or gs://; or a data
            set with such files, hub:ORG/NAME[@REVISION].
        media: a folder or prefix with the clips, or tar files: a path, a folder or a glob, local, gs:// or hub:.

    Raises:
        InputError: no such files exist.
        StorageError: storage failed.
    """
    files = _files(source)
    manifests = [file for file in files if not file.name.endswith(TAR)]
    if source.startswith("hub:") or len(files) > 1:
        manifests = [file for file in files if file.name.endswith((".jsonl", *PARQUET))]
    parts = [file for file in files if file.name.endswith(TAR)]
    rows_inside = bool(parts) and not manifests and media is None
    tables = [file for file in manifests if file.name.endswith(PARQUET)]
    if tables and (len(tables) < len(manifests) or (_clips_inside(tables[0]) and (parts or media))):
        raise InputError(f"{source}: Parquet files beside other manifests, or clips in both; name the files to read")
    if tables and _clips_inside(tables[0]):
        manifests, parts, rows_inside = [], tables, True
    if not manifests and not rows_inside:
        raise InputError(f"{source}: has no .jsonl, .parquet or .tar files")
    first = (manifests or files)[0]
    dataset, base = first.dataset, os.path.dirname(first.path)
    if media is not None:
        found = _files(media, must=False)
        parts = [file for file in found if file.name.endswith(TAR)]
        dataset, base = found[0].dataset, "" if media.startswith("hub:") else media
    return Source(manifests, parts, rows_inside, base, dataset, media is not None)


def spool(source: Source, folder: Path) -> Path:
    """Provide the manifests as one local JSONL file: the file itself, or a copy in `folder`."""
    if len(source.manifests) == 1 and _is_local_jsonl(source.manifests[0]):
        return Path(source.manifests[0].path)
    path = folder / "manifest.jsonl"
    with storage.local_errors(str(path)), path.open("wb") as copy:
        for file in source.manifests:
            if file.name.endswith(PARQUET):
                for row in _parquet_rows(file):
                    copy.write(_json(row) + b"\n")
            else:
                with file.open() as opened:
                    shutil.copyfileobj(opened, copy, 2**20)
                if len(source.manifests) > 1:
                    copy.write(b"\n")
    return path


def matches(video: str, member: str) -> bool:
    """Whether a row's video refers to a member of a tar part: one path ends with the other."""
    first, second = ([part for part in path.split("/") if part not in ("", ".")] for path in (video, member))
    short = min(len(first), len(second))
    return short > 0 and first[-short:] == second[-short:]


def samples(source: Source, part: File, folder: Path, wanted: Callable[[int, str], bool]) -> Iterator[Sample]:
    """Yield the clips of a part in order. Wanted clips are extracted into `folder`; the caller deletes them.

    Raises:
        InputError: the part is damaged or truncated; earlier samples are valid.
        StorageError: storage failed, or the disk is full.
    """
    try:
        with part.open() as file:
            if part.name.endswith(PARQUET):
                yield from _parquet_samples(file, folder, wanted)
            elif source.rows_inside:
                yield from _webdataset(part, file, folder, wanted)
            else:
                yield from _members(file, folder, wanted)
    except DAMAGE as error:
        raise InputError(f"damaged or cut short ({type(error).__name__}: {error})") from error


def _files(source: str, must: bool = True) -> list[File]:
    """The files of a source, sorted by name."""
    if source.startswith("hub:"):
        dataset = open_dataset(source)
        return [File(name, name, size, dataset) for name, size in sorted(dataset.sizes.items())]
    if re.search(r"[*?\[]", source):
        folder = re.split(r"[*?\[]", source)[0].rpartition("/")[0]
        pattern = source[len(folder) :].lstrip("/")
        found = [file for file in storage.listing(folder or ".") if fnmatch.fnmatchcase(file.name, pattern)]
    elif source.endswith(TAR + PARQUET) or (must and not source.endswith("/") and not os.path.isdir(source)):
        return [File(posixpath.basename(source), source, storage.size(source))]
    else:
        folder, found = source.rstrip("/") or "/", storage.listing(source)
    files = [File(file.name, storage.join(folder, file.name), file.bytes) for file in found]
    if not files:
        raise InputError(f"{source}: no such files")
    return files


def _is_local_jsonl(file: File) -> bool:
    return file.dataset is None and not storage.is_remote(file.path) and not file.name.endswith(PARQUET)


def _json(row: dict[str, Any]) -> bytes:
    return json.dumps({name: value for name, value in row.items() if value is not None}, default=str).encode()


def _members(file: io.BufferedIOBase, folder: Path, wanted: Callable[[int, str], bool]) -> Iterator[Sample]:
    stream = _decompressed(file)
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        number = 0
        while (member := tar.next()) is not None:
            tar.members = []  # otherwise every header stays in memory
            if member.isfile() and not posixpath.basename(member.name).startswith("."):
                number += 1
                extracted = _extract(tar, member, folder, number) if wanted(number, member.name) else None
                yield Sample(number, member.name, extracted, None)
        _drain(stream)


def _webdataset(
    part: File, file: io.BufferedIOBase, folder: Path, wanted: Callable[[int, str], bool]
) -> Iterator[Sample]:
    """Yield samples: consecutive members with the same key, the name up to the first dot after the last slash."""
    stem = posixpath.basename(part.name).split(".")[0]
    stream = _decompressed(file)
    with tarfile.open(fileobj=stream, mode="r|") as tar:
        number, key, clip, texts = 0, None, None, {}

        def sample() -> Sample:
            name, extracted = clip or (str(key), None)
            row = _row(f"{stem}/{key}", name, texts) if texts else None
            return Sample(number, name, extracted, row, clip is not None)

        while (member := tar.next()) is not None:
            tar.members = []
            base = posixpath.basename(member.name)
            if not member.isfile() or base.startswith("."):
                continue
            found = posixpath.join(posixpath.dirname(member.name), base.split(".")[0])
            suffix = base[len(base.split(".")[0]) :].lower()
            if found != key:
                if clip or texts:
                    yield sample()
                number, key, clip, texts = number + 1, found, None, {}
            if suffix in (".json", ".txt") and member.size <= ROW_TEXT:
                texts[suffix] = tar.extractfile(member).read()
            elif suffix.endswith(CLIPS) and clip is None:
                extracted = _extract(tar, member, folder, number) if wanted(number, member.name) else None
                clip = (member.name, extracted)
        if clip or texts:
            yield sample()
        _drain(stream)


def _row(name: str, video: str, texts: dict[str, bytes]) -> bytes:
    """The manifest line of a WebDataset sample. An invalid .json file becomes an invalid line."""
    try:
        fields = json.loads(texts.get(".json", b"{}"))
    except (ValueError, RecursionError):
        return texts[".json"].replace(b"\n", b" ")
    if not isinstance(fields, dict):
        return texts[".json"].replace(b"\n", b" ")
    if "messages" in fields:
        return _json({"id": name} | fields | {"videos": [video]})
    caption = texts.get(".txt", b"").decode(errors="replace").strip()
    return _json({"id": name, "caption": caption} | fields | {"video": video})


def _decompressed(file: io.BufferedReader) -> io.BufferedIOBase:
    return gzip.GzipFile(fileobj=file) if file.peek(2)[:2] == b"\x1f\x8b" else file


def _drain(stream: io.BufferedIOBase) -> None:
    """Read to the end, so that gzip verifies its checksum."""
    while stream.read(2**20):
        pass


def _extract(tar: tarfile.TarFile, member: tarfile.TarInfo, folder: Path, number: int) -> Path:
    path = _path(folder, number, member.name)
    with tar.extractfile(member) as clip, storage.local_errors(str(path)), path.open("wb") as file:
        shutil.copyfileobj(clip, file, 2**20)
    return path


def _path(folder: Path, number: int, name: str) -> Path:
    suffix = posixpath.splitext(name)[1].lower()
    return folder / f"{number:08d}{suffix if suffix in CLIPS else ''}"


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'avocado-jax[parquet]'") from error
    return pyarrow


def _parquet(file: io.BufferedIOBase) -> Any:
    pyarrow = _pyarrow()
    try:
        return pyarrow.parquet.ParquetFile(file)
    except pyarrow.ArrowException as error:
        raise InputError(f"not a Parquet file ({error})") from error


def _clips_inside(file: File) -> bool:
    """Whether the `video` column contains bytes, or structs with bytes."""
    with file.open() as opened:
        schema = _parquet(opened).schema_arrow
    import pyarrow.types

    if "video" not in schema.names:
        return False
    kind = schema.field("video").type
    return pyarrow.types.is_struct(kind) or pyarrow.types.is_binary(kind) or pyarrow.types.is_large_binary(kind)


def _parquet_rows(file: File) -> Iterator[dict[str, Any]]:
    with file.open() as opened:
        for batch in _parquet(opened).iter_batches(batch_size=1024):
            yield from batch.to_pylist()


def _parquet_samples(file: io.BufferedIOBase, folder: Path, wanted: Callable[[int, str], bool]) -> Iterator[Sample]:
    number = 0
    for batch in _parquet(file).iter_batches(batch_size=1):
        for row in batch.to_pylist():
            number += 1
            video = row.pop("video", None)
            data, name = (video.get("bytes"), video.get("path")) if isinstance(video, dict) else (video, None)
            name = name or f"{number:08d}.mp4"
            extracted = None
            if data and wanted(number, name):
                extracted = _path(folder, number, name)
                with storage.local_errors(str(extracted)):
                    extracted.write_bytes(data)
            line = _json(row | ({"videos": [name]} if row.get("messages") else {"video": name}))
            yield Sample(number, name, extracted, line, bool(data))

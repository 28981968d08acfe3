"""List the clips of command-line inputs: files, folders, globs, objects in buckets, manifests and prepared shards."""

import fnmatch
import glob
import json
import mimetypes
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from avocado_jax.data import storage
from avocado_jax.data.container import Packets, printable
from avocado_jax.data.manifest import prompt_fields
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.reader import ClipReader
from avocado_jax.data.records import decoded
from avocado_jax.data.sources import Shards, open_shards
from avocado_jax.errors import InputError

T = TypeVar("T")
WILDCARD = re.compile(r"[*?\[]")
# Suffixes of clips in a folder, in addition to those registered as video/*.
SUFFIXES = {".mkv", ".ts", ".m2ts", ".mts", ".vob", ".flv", ".ogv", ".mxf", ".nut", ".y4m", ".rm", ".rmvb", ".divx"}


class ClipSource(NamedTuple):
    """A clip to read.

    Attributes:
        name: identifies the clip in outputs: the input as given, or the path found in a folder.
        path: path of the file, local or gs://; empty for a record of prepared shards.
        fields: the fields `prompt`, `system` and `media_first` of the manifest line, if present.
        shards: prepared shards with the record; None for files.
        record: index of the record in `shards`.
        error: the reason why the clip cannot be read, if known in advance.
    """

    name: str
    path: str = ""
    fields: Mapping[str, Any] = {}
    shards: Shards | None = None
    record: int = 0
    error: str = ""

    def may_exist(self) -> bool:
        """False if the clip is known to be missing or invalid."""
        return not self.error and (not self.path or storage.is_remote(self.path) or os.path.exists(self.path))

    def read(
        self, reader: ClipReader, reading: Reading, sound: bool = True, part: Packets | None = None
    ) -> tuple[Media, Mapping[str, Any]]:
        """Read the clip or a part of it, and return it with the fields of its prompt.

        Raises:
            InputError: the clip cannot be read; the message starts with its name.
            StorageError: storage failed.
        """
        if self.error:
            raise InputError(f"{printable(self.name)}: {self.error}")
        if self.shards is not None:
            record = self.shards[self.record]
            media = decoded(record, reading, lambda path, reading: reader.read(path, reading, sound))
            return (media if sound else media._replace(samples=None)), prompt_fields(record.fields)
        return self._with_file(lambda path: reader.read(path, reading, sound, part)), self.fields

    def segments(self, reader: ClipReader, target: float, longest: float) -> list[Packets]:
        """The segments of the clip's file (`segments.find_segments`). Raises as `read`."""
        if self.error:
            raise InputError(f"{printable(self.name)}: {self.error}")
        return self._with_file(lambda path: reader.segments(path, target, longest))

    def _with_file(self, call: Callable[[Path], T]) -> T:
        with storage.local_copy(self.path) as local:
            try:
                return call(local)
            except InputError as error:
                raise InputError(str(error).replace(printable(local), printable(self.name))) from error


def list_clips(inputs: Sequence[str], manifest: str | None = None, reading: Reading = Reading()) -> list[ClipSource]:
    """List the clips of the inputs, in order; those of a folder or bucket are sorted by name.

    A missing file becomes a clip that cannot be read, so that the other clips are still captioned.

    Args:
        manifest: JSONL file, local or gs://, with "video" in each line (gs:// or relative to the manifest).
        reading: how the clips of prepared shards are sampled.

    Raises:
        InputError: an input has no clip, or the manifest or a bucket cannot be read.
        StorageError: storage failed.
    """
    clips = [clip for given in inputs for clip in _clips_of(given, reading)]
    return clips + list(_manifest_clips(manifest) if manifest else ())


def _clips_of(given: str, reading: Reading) -> list[ClipSource]:
    if storage.is_remote(given):
        return _remote_clips(given, reading)
    if os.path.isdir(given):
        if os.path.isfile(os.path.join(given, "manifest.json")):
            return _records(given, reading)
        names = [
            os.path.join(folder, name)
            for folder, folders, names in os.walk(given)
            for name in (folders.sort() or sorted(names))
            if is_video(name)
        ]
        return [ClipSource(name, name) for name in _not_empty(names, given)]
    if not os.path.exists(given) and WILDCARD.search(given):
        return [ClipSource(name, name) for name in _not_empty(sorted(glob.glob(given, recursive=True)), given)]
    return [ClipSource(given, given)]


def _remote_clips(given: str, reading: Reading) -> list[ClipSource]:
    folder = given.rstrip("/")
    if not WILDCARD.search(given):
        if not given.endswith("/") and storage.exists(given):
            return [ClipSource(given, given)]
        if storage.exists(f"{folder}/manifest.json"):
            return _records(folder, reading)
    if WILDCARD.search(given):
        folder = WILDCARD.split(given)[0].rpartition("/")[0]
    names = [f"{folder}/{file.name}" for file in storage.listing(folder) if is_video(file.name)]
    if WILDCARD.search(given):
        names = fnmatch.filter(names, given)
    return [ClipSource(name, name) for name in _not_empty(names, given)]


def _records(folder: str, reading: Reading) -> list[ClipSource]:
    shards = open_shards(folder, reading)
    return [ClipSource(name, shards=shards, record=number) for number, name in enumerate(shards.index.ids)]


def _manifest_clips(path: str) -> Iterator[ClipSource]:
    """Yield the clips of a manifest. An invalid line becomes a clip that cannot be read."""
    folder = path.rpartition("/")[0]
    for number, line in enumerate(storage.read(path).splitlines(), start=1):
        if not line.strip():
            continue
        name = f"{path}:{number}"
        try:
            fields = json.loads(line)
            if not isinstance(fields, dict) or not isinstance(video := fields.get("video"), str) or not video:
                raise InputError("has no 'video'")
            name = fields["id"] if isinstance(fields.get("id"), str) else video
            yield ClipSource(name, storage.join(folder, video), prompt_fields(fields))
        except (ValueError, RecursionError) as error:
            yield ClipSource(name, error=f"not JSON ({error})")
        except InputError as error:
            yield ClipSource(name, error=str(error))


def _not_empty(names: list[str], given: str) -> list[str]:
    if not names:
        raise InputError(f"{printable(given)}: no video in it")
    return names


def is_video(name: str) -> bool:
    """Whether the suffix of a file is that of a video."""
    return (mimetypes.guess_type(name)[0] or "").startswith("video/") or Path(name).suffix.lower() in SUFFIXES

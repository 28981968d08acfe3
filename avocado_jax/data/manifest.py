"""Parse manifests: JSONL lines in the native or ms-swift format become entries or rejects."""

import hashlib
import io
import json
import re
from array import array
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import msgpack
import numpy as np

from avocado_jax.data.probes import read_probe
from avocado_jax.data.records import LISTS
from avocado_jax.errors import InputError
from avocado_jax.typing import Array

MARK = re.compile("<video>|<audio>|<image>")  # media placeholders of ms-swift
LONGEST_LINE = 64 * 2**20  # maximum bytes of a line
REASON = 1000  # maximum characters of a reject's texts


class Entry(NamedTuple):
    """A valid line."""

    line: int  # from 1
    video: str  # as given
    fields: dict[str, Any]  # the other fields: id, caption, ...


class Reject(NamedTuple):
    """A line or clip that is excluded."""

    line: int  # line number in the manifest, or sample number (from 1) in a part with rows; 0: a complete part
    id: str | None
    video: str | None
    reason: str
    retry: bool = False  # the error may be temporary: the next run retries the clip
    part: str = ""  # name of the clip's tar or Parquet part


class Lines(NamedTuple):
    """Arrays with one entry per valid line of a manifest, in order, and the rejected lines."""

    number: Array  # int32, from 1
    start: Array  # int64, byte offset
    bytes: Array  # int32, length of the line
    video: Array  # uint64, hash of the clip's key
    content: Array  # uint64, hash of the line and its id
    rejects: list[Reject]
    size: int  # bytes of the manifest, or the limit
    prefix_md5: dict[int, str]  # N -> MD5 of the first N bytes

    def text(self, file: io.BufferedIOBase, row: int) -> bytes:
        """Read the line of an entry."""
        file.seek(int(self.start[row]))
        return file.read(int(self.bytes[row]))


def hash_name(text: str) -> int:
    """A 64-bit hash of a name, the same in every process."""
    return _hash(text.encode(errors="surrogatepass"))


def _hash(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little")


def parse_line(line: bytes, number: int) -> Entry | Reject:
    """Parse a line: `{"id", "video", "caption", ...}`, or ms-swift's `{"messages": [...], "videos": [path]}`."""
    record: Any = None
    try:
        record = _loaded(line)
        fields = _from_swift(record, number) if "messages" in record else dict(record)
        return Entry(number, _checked(fields), fields)
    except Exception as error:  # one line must not stop the job
        known = [_text(record.get(key)) if isinstance(record, dict) else None for key in ("id", "video")]
        reason = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {error}"
        return Reject(number, *known, " ".join(reason.split())[:REASON])


def parse_manifest(text: bytes) -> tuple[list[Entry], list[Reject]]:
    """Parse a manifest in memory into valid entries in order and rejects. Of lines with equal ids, the first is valid.

    Empty lines are skipped, but numbered. Use `scan_manifest` for large manifests.
    """
    entries: list[Entry] = []
    rejects: list[Reject] = []
    taken: dict[str, int] = {}
    for number, line in enumerate(text.split(b"\n"), start=1):
        if not line.strip():
            continue
        parsed = parse_line(line, number)
        if isinstance(parsed, Entry) and (name := parsed.fields["id"]) in taken:
            parsed = _duplicate(parsed, taken[name])
        if isinstance(parsed, Reject):
            rejects.append(parsed)
        else:
            taken[parsed.fields["id"]] = number
            entries.append(parsed)
    return entries, rejects


def scan_manifest(
    file: io.BufferedIOBase, key: Callable[[str], str], limit: int | None = None, prefix_sizes: Collection[int] = ()
) -> Lines:
    """Check a manifest line by line. Memory: 44 bytes per line, and the rejects.

    Args:
        key: maps a line's video to the key of its clip.
        limit: bytes to read; None: to the end.
        prefix_sizes: byte counts of prefixes whose MD5 is returned in addition to that of the file.
    """
    numbers, starts, sizes, videos, contents, ids = (array(kind) for kind in "iqiQQQ")
    rejects: list[Reject] = []
    prefix_md5: dict[int, str] = {}
    digest, at, number = hashlib.md5(usedforsecurity=False), 0, 0
    bounds = sorted(size for size in prefix_sizes if limit is None or size < limit)
    skipping = False  # True in the rest of a line that is too long
    while data := file.readline(LONGEST_LINE + 1 if limit is None else min(LONGEST_LINE + 1, limit - at)):
        first = 0
        while bounds and bounds[0] <= at + len(data):
            digest.update(data[first : bounds[0] - at])
            first, prefix_md5[bounds[0]] = bounds[0] - at, digest.hexdigest()
            del bounds[0]
        digest.update(data[first:])
        short = data.endswith(b"\n") or len(data) <= LONGEST_LINE
        number += not skipping
        if not skipping and data.strip():
            parsed = parse_line(data, number) if short else Reject(number, None, None, "is too long for a line")
            if isinstance(parsed, Reject):
                rejects.append(parsed)
            else:
                numbers.append(number)
                starts.append(at)
                sizes.append(len(data))
                ids.append(hash_name(parsed.fields["id"]))
                videos.append(hash_name(key(parsed.video)))
                contents.append(_hash(data.strip() + parsed.fields["id"].encode()))
        skipping = not data.endswith(b"\n") and (skipping or not short)
        at += len(data)
    prefix_md5[at] = digest.hexdigest()
    columns = [np.array(column, kind) for column, kind in zip((numbers, starts, sizes, videos, contents), "iqiQQ")]
    _, first, which = np.unique(np.array(ids, np.uint64), return_index=True, return_inverse=True)
    keep = first[which] == np.arange(len(which))
    for row in np.flatnonzero(~keep).tolist():
        file.seek(starts[row])
        entry = parse_line(file.read(sizes[row]), numbers[row])
        rejects.append(_duplicate(entry, numbers[first[which[row]]]))
    rejects.sort(key=lambda reject: reject.line)
    return Lines(*(column[keep] for column in columns), rejects, at, prefix_md5)


def _duplicate(entry: Entry, line: int) -> Reject:
    return Reject(entry.line, entry.fields["id"], entry.video, f"its id is that of line {line}")


def _text(value: Any) -> str | None:
    return value[:REASON] if isinstance(value, str) else None


def _loaded(line: bytes) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 ({error.reason} at byte {error.start})") from error
    except (ValueError, RecursionError) as error:  # an integer of thousands of digits raises ValueError too
        raise InputError(f"not JSON ({error})") from error
    if not isinstance(record, dict):
        raise InputError("not a JSON object")
    return record


def _checked(fields: dict[str, Any]) -> str:
    """Check the types of the fields, then remove and return `video`."""
    for name in ("id", "video", "caption"):
        if name not in fields:
            raise InputError(f"has no '{name}'")
        if not isinstance(fields[name], str) or not fields[name].strip():
            raise InputError(f"its '{name}' is not a text, or empty")
    prompt_fields(fields)
    for name in LISTS:
        kind = str if name == "references" else dict
        items = fields.get(name, [])
        if not isinstance(items, list) or not all(isinstance(item, kind) for item in items):
            raise InputError(f"its '{name}' is not a list of {'texts' if kind is str else 'objects'}")
    for probe in fields.get("probes", ()):
        read_probe(probe)
    try:
        json.dumps(fields, ensure_ascii=False).encode()
        msgpack.packb(fields)
    except UnicodeEncodeError as error:
        raise InputError("a text in it contains an unpaired surrogate") from error
    except (OverflowError, ValueError) as error:
        raise InputError(f"cannot be stored: {error}") from error
    if "\0" in fields["video"]:
        raise InputError("its 'video' is not a file name: it has a NUL character")
    return fields.pop("video")


def prompt_fields(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Select the fields `prompt`, `system` and `media_first` that a line has.

    Raises:
        InputError: a field has the wrong type.
    """
    kinds = {"prompt": str, "system": str, "media_first": bool}
    for name, kind in kinds.items():
        if name in fields and not isinstance(fields[name], kind):
            raise InputError(f"its '{name}' is not {'a text' if kind is str else 'true or false'}")
    return {name: fields[name] for name in kinds if name in fields}


def _from_swift(record: dict[str, Any], number: int) -> dict[str, Any]:
    """Convert an ms-swift line to the native fields. The id defaults to the video and the line number."""
    videos, messages = record.get("videos"), record["messages"]
    if not isinstance(videos, list) or len(videos) != 1 or not isinstance(videos[0], str):
        raise InputError("'videos' is not a list of one path")
    if record.get("audios") or record.get("images"):
        raise InputError("separate sound or pictures beside the video are not supported")
    if not isinstance(messages, list) or not all(
        isinstance(part, dict) and isinstance(part.get("content"), str) for part in messages
    ):
        raise InputError("'messages' is not a list of {role, content} with texts")
    roles = [part.get("role") for part in messages]
    texts = dict(zip(roles, (part["content"] for part in messages)))
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        raise InputError(f"messages by {roles}: one question and one answer are supported")
    # The placeholders mark the position of the media: before or after the question.
    before, *inner, after = MARK.split(texts["user"]) if MARK.search(texts["user"]) else ("", texts["user"])
    if (before.strip() and after.strip()) or any(part.strip() for part in inner):
        raise InputError("the video is in the middle of the question; it must be before or after the text")
    fields = {"id": record.get("id", f"{videos[0]}#{number}"), "video": videos[0], "caption": texts["assistant"]}
    if prompt := before.strip() or after.strip():
        fields["prompt"] = prompt
    if "system" in texts:  # empty: none
        fields["system"] = texts["system"]
    return fields | ({"media_first": False} if before.strip() else {})

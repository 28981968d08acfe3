"""Records: a clip, its caption and other fields, serialised with msgpack."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import msgpack
import numpy as np

from avocado_jax.data import storage
from avocado_jax.data.media import Media, Reading
from avocado_jax.errors import InputError

VERSION = 1
LISTS = ("references", "events", "dialogues", "keypoints", "probes")


class Record(NamedTuple):
    """A stored clip."""

    fields: dict[str, Any]  # the manifest line without its video: id, caption, ...
    clip: bytes | Media  # an encoded file, or decoded features
    name: str  # file name, for messages and as a format hint


def pack(record: Record) -> bytes:
    """Encode a record."""
    if isinstance(record.clip, bytes):
        clip: dict[str, Any] = {"video": record.clip}
    else:
        frames, samples, seconds = record.clip[:3]
        clip = {"frames": frames.tobytes(), "size": frames.shape, "seconds": seconds}
        clip["samples"] = None if samples is None else samples.astype("<f4").tobytes()
    return msgpack.packb({"version": VERSION, "fields": record.fields, "name": record.name, **clip})


def unpack(data: bytes) -> Record:
    """Decode a record.

    Raises:
        InputError: the data are damaged, or of another version.
    """
    try:
        entry = msgpack.unpackb(data)
        if entry["version"] != VERSION:
            raise InputError(f"a record of version {entry['version']}; this code reads {VERSION}: run prepare again")
        if "video" in entry:
            return Record(entry["fields"], entry["video"], entry["name"])
        frames = np.frombuffer(entry["frames"], np.uint8).reshape(entry["size"])
        samples = None if entry["samples"] is None else np.frombuffer(entry["samples"], "<f4")
        return Record(entry["fields"], Media(frames, samples, entry["seconds"]), entry["name"])
    except (msgpack.UnpackException, ValueError, KeyError, TypeError) as error:
        raise InputError(f"a damaged record ({error})") from error


def from_example(example: dict[str, Any]) -> Record:
    """Convert an example of a tfds data set: texts are bytes, lists are JSON texts, `video` contains the file.

    Raises:
        InputError: the example has no id, caption or video.
    """
    fields = {
        key: value.decode() if isinstance(value, bytes) else value for key, value in example.items() if key != "video"
    }
    for name in LISTS:
        if isinstance(fields.get(name), str):
            fields[name] = json.loads(fields[name])
    missing = [name for name in ("id", "caption") if not fields.get(name)] + ["video"] * ("video" not in example)
    if missing:
        raise InputError(f"an example without {', '.join(missing)}")
    plain = {key: value.item() if isinstance(value, np.generic) else value for key, value in fields.items()}
    return Record(plain, bytes(example["video"]), plain["id"])


def decoded(record: Record, reading: Reading, read: Callable[[str, Reading], Media] | None = None) -> Media:
    """Decode the clip of a record.

    Args:
        read: reads a file; default: `read_media` in this process.

    Raises:
        InputError: one line with the reason.
        StorageError: the disk is too full for a temporary file.
    """
    if isinstance(record.clip, Media):
        return record.clip
    # The reader opens a clip several times by path. Do not use /dev/shm: it is small in containers, and the workers
    # need it for rows.
    with tempfile.NamedTemporaryFile(suffix=Path(record.name).suffix[-16:]) as file:
        with storage.local_errors(file.name):
            file.write(record.clip)
            file.flush()
        if read is None:
            from avocado_jax.data.decode import (
                read_media as read,  # needs PyAV: training on AVWorld or features does not
            )

        try:
            return read(file.name, reading)
        except InputError as error:
            raise InputError(str(error).removeprefix(f"{file.name}: ").replace(file.name, record.name)) from error

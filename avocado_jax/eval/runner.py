"""Captions of a benchmark's clips, appended to a file as they are made, so that a killed run resumes.

A line of the file is {"id", "caption", "tokens", "key"}; `key` is a digest of all inputs of the caption;
lines with another key are ignored. Failed clips are not stored: the next run retries them.
"""

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from avocado_jax.data import storage
from avocado_jax.data.appended import open_lines
from avocado_jax.data.clips import ClipSource
from avocado_jax.data.reader import CLIP_SECONDS, READERS, ClipReader, read_ahead
from avocado_jax.data.rows import Row
from avocado_jax.errors import InputError, first_line
from avocado_jax.jsonl import parse_lines, read_lines
from avocado_jax.progress import progress
from avocado_jax.sampling.captioner import Captioner, words
from avocado_jax.sampling.engine import Engine

KEPT = {"id": str, "caption": str, "tokens": int, "key": str}
GREY = 128
FAILURES = (InputError, MemoryError, jax.errors.JaxRuntimeError)  # of one clip: the others are still captioned


class Item(NamedTuple):
    """One clip to caption."""

    id: str
    video: str  # local or gs://
    prompt: Mapping[str, Any] = {}  # `prompt`, `system` and `media_first`, where they are not the captioner's
    bytes: int | None = 0  # of the file; None: there is none


class Videos:
    """Which files there are in a folder, local or gs://. A bucket is listed once."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        remote = storage.listing(folder) if storage.is_remote(folder) else []
        self._bytes = {storage.join(folder, file.name): file.bytes for file in remote}

    def size(self, path: str) -> int | None:
        """The bytes of a file; None if there is none. 0 for an object outside of the folder, which is not listed."""
        if storage.is_remote(path):
            return self._bytes.get(path) if path.startswith(f"{self.folder.rstrip('/')}/") else 0
        return os.path.getsize(path) if os.path.isfile(path) else None


@dataclass(frozen=True)
class How:
    """What decides the captions beside the checkpoint."""

    tokens: int  # at most
    dtype: str
    sound: bool = True
    picture: bool = True  # else every frame is grey, of the same size


class Caption(NamedTuple):
    """One caption."""

    text: str
    tokens: int | None  # its length without the stop id, where it is known


class Outcome(NamedTuple):
    """Captions by id, and why the others have none."""

    captions: dict[str, Caption]
    failed: dict[str, str]


class TooManyFailed(Exception):
    """More clips could not be captioned than the run allows."""


def caption_items(
    items: Sequence[Item],
    load: Callable[[], Captioner],
    identity: str,
    how: How,
    file: str,
    slots: int,
    max_failed: float,
    others: Sequence[str] = (),
    clip_seconds: float = CLIP_SECONDS,
) -> Outcome:
    """Greedy captions of all items, those that `file` holds among them.

    Args:
        load: makes the captioner; not called where nothing is left to do.
        identity: of the checkpoint.
        slots: clips that are decoded together.
        max_failed: share of the items.
        others: more files that hold captions, such as those of other hosts; they are only read.
        clip_seconds: to read one clip, which then counts as failed.

    Raises:
        InputError: `file` cannot be written, is in use or holds other things.
        StorageError: storage failed; the captions made so far are kept.
        TooManyFailed: more than `max_failed` of the items failed; those made so far are kept.
    """
    keys = {item.id: caption_key(item, identity, how) for item in items}
    with ExitStack() as stack:
        out, data = open_lines(file, stack)
        lines = _parsed(data, file)
        every = [*(line for other in others for line in _whole(other)), *lines]
        made = {
            line["id"]: Caption(line["caption"], line["tokens"])
            for line in every
            if keys.get(line["id"]) == line["key"]
        }
        left = [item for item in items if item.id not in made]
        failed: dict[str, str] = {}
        if not left:
            return Outcome(made, failed)
        if len(left) < len(items):
            print(f"captions: {len(items) - len(left)} of {len(items)} are in {file} already", file=sys.stderr)

        captioned = _captioned(load(), left, how, slots, clip_seconds)
        for item, caption in progress(captioned, "captions", len(left)):
            if isinstance(caption, Caption):
                made[item.id] = caption
                line = dict(id=item.id, caption=caption.text, tokens=caption.tokens, key=keys[item.id])
                out.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                continue
            if isinstance(caption, storage.StorageError):  # it may pass: no verdict on the clip
                raise caption
            failed[item.id] = reason = first_line(caption)
            print(f"{item.id}: {reason}", file=sys.stderr)
            if len(failed) > max_failed * len(items):
                raise TooManyFailed(
                    f"stopped: {len(failed)} of {len(items)} clips failed (listed above), "
                    f"more than the share of {max_failed:g} that is allowed; {len(made)} captions are kept in {file}"
                )
    return Outcome(made, failed)


def caption_key(item: Item, identity: str, how: How) -> str:
    """A digest of what decides an item's caption: the checkpoint, the options, the question and the clip."""
    return digest([identity, asdict(how), dict(item.prompt), item.video.rpartition("/")[2], item.bytes or 0])


def digest(value: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _whole(file: str) -> list[dict[str, Any]]:
    """The lines of a file of captions that another run may be writing to."""
    data = storage.read(file)
    return _parsed(data[: data.rfind(b"\n") + 1], file)


def _parsed(data: bytes, file: str) -> list[dict[str, Any]]:
    return [line for _, line in parse_lines(data, file, KEPT)] if data else []


def _captioned(
    captioner: Captioner, items: Sequence[Item], how: How, slots: int, clip_seconds: float
) -> Iterator[tuple[Item, Caption | Exception]]:
    """Every item with its caption, or with the reason why it has none, as they finish."""

    def row(item: Item) -> Row:
        media, _ = ClipSource(item.video, item.video).read(reader, captioner.reading, how.sound)
        for warning in media.warnings:
            print(f"{item.id}: warning: {warning}", file=sys.stderr)
        if not how.picture:
            media = media._replace(frames=np.full_like(media.frames, GREY))
        return captioner.row(media, item.prompt)

    with ClipReader(READERS, clip_seconds) as reader:
        requests = ((item, made, 0) for item, made in read_ahead(items, row, READERS, 2 * READERS))
        for item, tokens in Engine(captioner, how.tokens, slots=slots).run(requests):
            if isinstance(tokens, Exception):
                yield item, tokens
                continue
            stopped = int(tokens[-1]) in captioner.stops
            yield item, Caption(words(captioner, tokens), len(tokens) - stopped)


def read_captions(file: Path, known: Mapping[str, Any]) -> dict[str, Caption]:
    """Captions made elsewhere: lines {"id", "caption"}, or {"clip", "caption"} of `avocado caption --manifest`.

    Args:
        known: the benchmark's ids.

    Raises:
        InputError: a line is not so, an id is not known or has two captions.
    """
    captions: dict[str, Caption] = {}
    for where, line in read_lines(file, {"caption": str}):
        name = line.get("id", line.get("clip"))
        if not isinstance(name, str):
            raise InputError(f'{where}: "id" must be a string')
        if name not in known:
            raise InputError(f"{where}: the data have no clip {json.dumps(name)}")
        if name in captions:
            raise InputError(f"{where}: a second caption of {json.dumps(name)}")
        tokens = line.get("tokens")
        captions[name] = Caption(line["caption"], tokens if type(tokens) is int else None)
    return captions

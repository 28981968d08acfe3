"""Caption the clips of a benchmark. Captions are appended to a file, so that a killed run resumes.

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
FAILURES = (InputError, MemoryError, jax.errors.JaxRuntimeError)  # errors of one clip, which do not stop the run


class Item(NamedTuple):
    """A clip to caption."""

    id: str
    video: str  # local or gs://
    prompt: Mapping[str, Any] = {}  # `prompt`, `system` and `media_first` that differ from the captioner's
    bytes: int | None = 0  # size of the file; None: the file is missing


class Videos:
    """The files of a folder, local or gs://. A bucket is listed once."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        remote = storage.listing(folder) if storage.is_remote(folder) else []
        self._bytes = {storage.join(folder, file.name): file.bytes for file in remote}

    def size(self, path: str) -> int | None:
        """The size of a file in bytes: None if it is missing, 0 for unlisted objects (outside the folder)."""
        if storage.is_remote(path):
            return self._bytes.get(path) if path.startswith(f"{self.folder.rstrip('/')}/") else 0
        return os.path.getsize(path) if os.path.isfile(path) else None


@dataclass(frozen=True)
class CaptionOptions:
    """The settings that determine captions, in addition to the checkpoint."""

    tokens: int  # maximum tokens of a caption
    dtype: str
    sound: bool = True
    picture: bool = True  # False: replace all frames by grey ones


class Caption(NamedTuple):
    """A caption."""

    text: str
    tokens: int | None  # length without the stop id; None if unknown


class Outcome(NamedTuple):
    """Captions by id, and the errors of clips without a caption."""

    captions: dict[str, Caption]
    failed: dict[str, str]


class TooManyFailed(Exception):
    """More clips failed than the run allows."""


def caption_items(
    items: Sequence[Item],
    load: Callable[[], Captioner],
    identity: str,
    options: CaptionOptions,
    file: str,
    slots: int,
    max_failed: float,
    others: Sequence[str] = (),
    clip_seconds: float = CLIP_SECONDS,
) -> Outcome:
    """Caption all items greedily, except those with a caption in `file` or `others`.

    Args:
        load: loads the captioner; called only if captions are missing.
        identity: identity of the checkpoint.
        file: captions are appended to this file.
        slots: number of clips decoded together.
        max_failed: maximum share of failed items.
        others: further files with captions, such as those of other hosts; read only.
        clip_seconds: timeout for reading one clip.

    Raises:
        InputError: `file` cannot be written, is in use, or has other content.
        StorageError: storage failed. Finished captions are kept.
        TooManyFailed: more than `max_failed` of the items failed. Finished captions are kept.
    """
    keys = {item.id: caption_key(item, identity, options) for item in items}
    with ExitStack() as stack:
        out, data = open_lines(file, stack)
        lines = _parsed(data, file)
        every = [*(line for other in others for line in _complete_lines(other)), *lines]
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

        captioned = _captioned(load(), left, options, slots, clip_seconds)
        for item, caption in progress(captioned, "captions", len(left)):
            if isinstance(caption, Caption):
                made[item.id] = caption
                line = dict(id=item.id, caption=caption.text, tokens=caption.tokens, key=keys[item.id])
                out.append(json.dumps(line, ensure_ascii=False).encode() + b"\n")
                continue
            if isinstance(caption, storage.StorageError):  # may be temporary: not a failure of the clip
                raise caption
            failed[item.id] = reason = first_line(caption)
            print(f"{item.id}: {reason}", file=sys.stderr)
            if len(failed) > max_failed * len(items):
                raise TooManyFailed(
                    f"stopped: {len(failed)} of {len(items)} clips failed (listed above), "
                    f"more than the share of {max_failed:g} that is allowed; {len(made)} captions are kept in {file}"
                )
    return Outcome(made, failed)


def caption_key(item: Item, identity: str, options: CaptionOptions) -> str:
    """A digest of all inputs of an item's caption: the checkpoint, the options, the question and the clip."""
    return digest([identity, asdict(options), dict(item.prompt), item.video.rpartition("/")[2], item.bytes or 0])


def digest(value: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def _complete_lines(file: str) -> list[dict[str, Any]]:
    """The complete lines of a captions file that another run may be writing."""
    data = storage.read(file)
    return _parsed(data[: data.rfind(b"\n") + 1], file)


def _parsed(data: bytes, file: str) -> list[dict[str, Any]]:
    return [line for _, line in parse_lines(data, file, KEPT)] if data else []


def _captioned(
    captioner: Captioner, items: Sequence[Item], options: CaptionOptions, slots: int, clip_seconds: float
) -> Iterator[tuple[Item, Caption | Exception]]:
    """Yield every item with its caption or error, on completion."""

    def row(item: Item) -> Row:
        media, _ = ClipSource(item.video, item.video).read(reader, captioner.reading, options.sound)
        for warning in media.warnings:
            print(f"{item.id}: warning: {warning}", file=sys.stderr)
        if not options.picture:
            media = media._replace(frames=np.full_like(media.frames, GREY))
        return captioner.row(media, item.prompt)

    with ClipReader(READERS, clip_seconds) as reader:
        requests = ((item, made, 0) for item, made in read_ahead(items, row, READERS, 2 * READERS))
        for item, tokens in Engine(captioner, options.tokens, slots=slots).run(requests):
            if isinstance(tokens, Exception):
                yield item, tokens
                continue
            stopped = int(tokens[-1]) in captioner.stops
            yield item, Caption(words(captioner, tokens), len(tokens) - stopped)


def read_captions(file: Path, known: Mapping[str, Any]) -> dict[str, Caption]:
    """Read captions from a file: lines {"id", "caption"}, or {"clip", "caption"} of `avocado caption --manifest`.

    Args:
        known: the ids of the benchmark.

    Raises:
        InputError: a line has another form, or an id is unknown or has two captions.
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

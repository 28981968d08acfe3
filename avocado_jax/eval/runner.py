"""Captions of a benchmark's clips, made once: kept in a file as they come, so that a killed run goes on.

A line of the file is {"id", "caption", "tokens", "key"}; `key` is a digest of all that decides the caption, and
lines with another key are left alone. Clips that failed are not kept: the next run tries them again.
"""

import hashlib
import json
import sys
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import jax
import numpy as np

from avocado_jax.data.reader import CLIP_SECONDS, ClipReader
from avocado_jax.data.rows import Row, Shape, rounded, shape_of
from avocado_jax.errors import InputError
from avocado_jax.jsonl import appending, parse_lines, read_lines
from avocado_jax.progress import progress
from avocado_jax.sampling.captioner import GREEDY, Captioner, caption_rows, words

T = TypeVar("T")
R = TypeVar("R")
SHAPE_BITS = 2  # of each size that clips are padded to: fewer programs to compile than `rounded` makes by default
KEPT = {"id": str, "caption": str, "tokens": int, "key": str}
HELD = 4  # batches' worth of clips that wait for others of their shape, at most
GREY = 128
READERS = 2  # clips that are read at once
FAILURES = (InputError, MemoryError, jax.errors.JaxRuntimeError)  # of one clip: the others are still captioned


def first_line(error: Exception) -> str:
    """What an error says, in one line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


class Item(NamedTuple):
    """One clip to caption."""

    id: str
    video: Path
    prompt: Mapping[str, Any] = {}  # `prompt`, `system` and `media_first`, where they are not the captioner's


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
    file: Path,
    batch: int,
    max_failed: float,
    others: Sequence[Path] = (),
    clip_seconds: float = CLIP_SECONDS,
) -> Outcome:
    """Greedy captions of all items, those that `file` holds among them.

    A caption does not depend on which clips it is made with: rows share a batch where their own rounded shapes are
    the same, and every batch has `batch` rows.

    Args:
        load: makes the captioner; not called where nothing is left to do.
        identity: of the checkpoint.
        max_failed: share of the items.
        others: more files that hold captions, such as those of other hosts; they are only read.
        clip_seconds: to read one clip, which then counts as failed.

    Raises:
        InputError: `file` cannot be written, is in use or holds other things.
        TooManyFailed: more than `max_failed` of the items failed; those made so far are kept.
    """
    keys = {item.id: caption_key(item, identity, how) for item in items}
    with _kept(file) as (out, lines):
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

        def appended(groups: Iterable[list[tuple[Item, Caption | Exception]]]) -> Iterator[tuple[Item, Any]]:
            for group in groups:
                good = [(item, caption) for item, caption in group if isinstance(caption, Caption)]
                fields = [dict(id=item.id, caption=c.text, tokens=c.tokens, key=keys[item.id]) for item, c in good]
                out.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in fields).encode())
                out.flush()
                yield from group

        for item, caption in progress(
            appended(_captioned(load(), left, how, batch, clip_seconds)), "captions", len(left)
        ):
            if isinstance(caption, Caption):
                made[item.id] = caption
                continue
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
    size = item.video.stat().st_size if item.video.is_file() else 0
    return digest([identity, asdict(how), dict(item.prompt), item.video.name, size])


def digest(held: Any) -> str:
    """A short digest of plain data."""
    return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def _kept(file: Path) -> Iterator[tuple[BinaryIO, list[dict[str, Any]]]]:
    """The file of captions, ready to append to, and the lines it holds; what a kill left of a last line is cut."""
    with appending(file) as out:
        yield out, [line for _, line in read_lines(file, KEPT)] if file.stat().st_size else []


def _whole(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of captions that another run may be writing to."""
    data = file.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    return [line for _, line in parse_lines(whole, str(file), KEPT)] if whole else []


def _captioned(
    captioner: Captioner, items: Sequence[Item], how: How, batch: int, clip_seconds: float
) -> Iterator[list[tuple[Item, Caption | Exception]]]:
    """Every item with its caption or why it has none, in groups that were made together."""

    def row(item: Item) -> Row:
        media = reader.read(item.video, captioner.reading, sound=how.sound)
        for warning in media.warnings:
            print(f"{item.id}: warning: {warning}", file=sys.stderr)
        if not how.picture:
            media = media._replace(frames=np.full_like(media.frames, GREY))
        return captioner.row(media, item.prompt)

    waiting: dict[Shape, list[tuple[Item, Row]]] = defaultdict(list)
    with ClipReader(READERS, clip_seconds) as reader:
        for item, made in read_ahead(items, row, threads=READERS, depth=2 * batch):
            if isinstance(made, Exception):
                yield [(item, made)]
                continue
            shape = rounded(shape_of(made.clip), SHAPE_BITS)
            waiting[shape].append((item, made))
            if len(waiting[shape]) < batch and sum(map(len, waiting.values())) < HELD * batch:
                continue
            shape = max(waiting, key=lambda each: len(waiting[each]))
            yield _together(captioner, waiting.pop(shape), shape, how, batch)
    for shape in list(waiting):
        yield _together(captioner, waiting.pop(shape), shape, how, batch)


def _together(
    captioner: Captioner, group: list[tuple[Item, Row]], shape: Shape, how: How, batch: int
) -> list[tuple[Item, Caption | Exception]]:
    """Captions of rows of one shape, in a batch that is filled up with the last row."""
    rows = [row for _, row in group]
    rows += rows[-1:] * (batch - len(rows))
    try:
        samples = caption_rows(captioner, rows, np.zeros(batch, np.int32), GREEDY, how.tokens, shape=shape)
    except FAILURES as error:
        return [(item, error) for item, _ in group]
    made = []
    for (item, _), tokens, length in zip(group, samples.tokens[:, 0], samples.lengths[:, 0]):
        stopped = tokens[length - 1] in captioner.stops
        made.append((item, Caption(words(captioner, tokens[:length]), int(length) - int(stopped))))
    return made


def read_ahead(
    items: Iterable[T], read: Callable[[T], R], threads: int = 1, depth: int = 1
) -> Iterator[tuple[T, R | Exception]]:
    """Each item and what was read of it, or why it could not be; the next `depth` are read meanwhile."""

    def attempt(item: T) -> R | Exception:
        try:
            return read(item)
        except FAILURES as error:
            return error

    pool, waiting = ThreadPoolExecutor(threads), deque()
    try:
        for item in items:
            waiting.append((item, pool.submit(attempt, item)))
            if len(waiting) > depth:
                item, made = waiting.popleft()
                yield item, made.result()
        while waiting:
            item, made = waiting.popleft()
            yield item, made.result()
    finally:
        pool.shutdown(cancel_futures=True)


def read_captions(file: Path, known: Mapping[str, Any]) -> dict[str, Caption]:
    """Captions made elsewhere: lines {"id", "caption"}; `known` are the benchmark's ids.

    Raises:
        InputError: a line is not so, an id is not known or has two captions.
    """
    captions: dict[str, Caption] = {}
    for where, line in read_lines(file, {"id": str, "caption": str}):
        if line["id"] not in known:
            raise InputError(f"{where}: the data have no clip {json.dumps(line['id'])}")
        if line["id"] in captions:
            raise InputError(f"{where}: a second caption of {json.dumps(line['id'])}")
        tokens = line.get("tokens")
        captions[line["id"]] = Caption(line["caption"], tokens if type(tokens) is int else None)
    return captions

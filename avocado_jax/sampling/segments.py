"""Clips to the requests of the engine, long ones in segments, and captions of segments to captions of clips."""

import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from avocado_jax.data import storage
from avocado_jax.data.clips import ClipSource
from avocado_jax.data.container import Packets
from avocado_jax.data.media import Reading
from avocado_jax.data.prompt import choose_prompt
from avocado_jax.data.reader import READERS, ClipReader, read_ahead
from avocado_jax.data.rows import Row
from avocado_jax.sampling.captioner import Captioner, clip_warnings
from avocado_jax.typing import Array, Int


class Segment(NamedTuple):
    """A clip or a part of one: what the engine returns with its caption.

    Attributes:
        number: of the clip, in the order of the output.
        part: which part; None: all of the clip.
        index, count: which segment of the clip it is, and how many there are.
        prompt_ids, record: once it is read: the prompt, and the fields of the output that describe what was read.
    """

    number: int
    clip: ClipSource
    part: Packets | None = None
    index: int = 0
    count: int = 1
    prompt_ids: Any = ()
    record: Mapping[str, Any] = {}


class Segments(NamedTuple):
    """How clips are read.

    Attributes:
        sound: whether it is used.
        prompts: of which the name of a clip selects one; empty: the captioner's.
        lengths: of segments of long clips, in seconds: about the first, at most the second. None: clips are not cut.
        warn: called with a clip and what is lost of it.
    """

    reading: Reading
    reader: ClipReader
    sound: bool
    prompts: tuple[str, ...]
    lengths: tuple[float, float] | None
    warn: Callable[[ClipSource, str], None]


def read_segments(
    clips: Iterable[tuple[int, ClipSource]], captioner: Captioner | None, how: Segments
) -> Iterator[tuple[Segment, Row | Exception, int]]:
    """Read numbered clips, several at once, and make their rows: the requests of `Engine.run`."""

    def read(item: tuple[Segment, Exception | None, ExitStack]) -> tuple[Row, dict[str, Any]]:
        segment, error, _ = item
        if error:
            raise error
        clip = segment.clip
        media, fields = clip.read(how.reader, how.reading, how.sound, segment.part)
        if how.prompts:
            fields = {"prompt": choose_prompt(how.prompts, clip.name), **fields}
        row = captioner.row(media, fields)
        prefix = "from {:.0f} to {:.0f} s: ".format(*_times(segment.part)) if segment.part else ""
        for warning in clip_warnings(media, row, how.reading):
            how.warn(clip, prefix + warning)
        return row, {"seconds": round(media.seconds, 3), "audio": bool(len(row.clip.mel))}

    for (segment, _, copy), made in read_ahead(_segments(clips, how), read, READERS, 2 * READERS):
        if segment.index + 1 == segment.count:
            copy.close()
        if isinstance(made, Exception):
            yield segment, made, 0
        else:
            row, record = made
            name = segment.clip.name + (f"#{segment.index}" if segment.index else "")
            yield segment._replace(prompt_ids=row.prompt_ids, record=record), row, digest(name) >> 1


def _segments(
    clips: Iterable[tuple[int, ClipSource]], how: Segments
) -> Iterator[tuple[Segment, Exception | None, ExitStack]]:
    """The segments of each clip, or why it cannot be cut, and what ends its local copy."""
    if how.lengths is None:
        yield from ((Segment(number, clip), None, ExitStack()) for number, clip in clips)
        return

    def find(numbered: tuple[int, ClipSource]) -> tuple[list[Segment], ExitStack]:
        number, clip = numbered
        if not clip.path:  # of prepared shards
            return [Segment(number, clip)], ExitStack()
        with ExitStack() as stack:
            here = str(stack.enter_context(storage.here(clip.path)))
            parts = clip._replace(path=here).segments(how.reader, *how.lengths)
            parts = parts or [None]
            clip = clip._replace(path=here)
            found = [Segment(number, clip, part, index, len(parts)) for index, part in enumerate(parts)]
            return found, stack.pop_all()

    for (number, clip), found in read_ahead(clips, find, READERS, READERS):
        if isinstance(found, Exception):
            yield Segment(number, clip), found, ExitStack()
        else:
            yield from ((segment, None, found[1]) for segment in found[0])


def group_by_clip(
    results: Iterable[tuple[Segment, Int[Array, "N"] | Exception]],
) -> Iterator[tuple[list[Segment], list[Int[Array, "N"]] | Exception]]:
    """The segments of each clip with their captions, once all of them are there; or its first error."""
    waiting: dict[int, list[tuple[Segment, Any]]] = {}
    for segment, made in results:
        found = waiting.setdefault(segment.number, [])
        found.append((segment, made))
        if len(found) == segment.count:
            parts = sorted(waiting.pop(segment.number), key=lambda one: one[0].index)
            error = next((made for _, made in parts if isinstance(made, Exception)), None)
            yield [segment for segment, _ in parts], error or [made for _, made in parts]


def caption_fields(segments: Sequence[Segment], captions: Sequence[str]) -> dict[str, Any]:
    """The fields of the output of a clip that was captioned in segments."""
    ends = [_times(one.part) if one.part else (0.0, one.record["seconds"]) for one in segments]
    return {
        "segments": [
            {"start": round(start, 3), "end": round(end, 3), "caption": caption}
            for (start, end), caption in zip(ends, captions, strict=True)
        ],
        "seconds": round(ends[-1][1], 3),
        "audio": any(segment.record["audio"] for segment in segments),
    }


def _times(part: Packets) -> tuple[float, float]:
    return part.start, part.start + part.seconds


def digest(name: str) -> int:
    """Decides the draws of a clip, and its prompt, whatever its place in the list."""
    return zlib.crc32(os.fsencode(name))

"""Convert clips to engine requests, with long clips in segments, and join the captions of segments."""

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
    """A clip or a segment of a clip: the item of an engine request.

    Attributes:
        number: index of the clip in the output.
        part: the packets of the segment; None: the whole clip.
        index, count: index of the segment, and number of segments of the clip.
        prompt_ids, record: the prompt, and output fields that describe the media. Set after reading.
    """

    number: int
    clip: ClipSource
    part: Packets | None = None
    index: int = 0
    count: int = 1
    prompt_ids: Any = ()
    record: Mapping[str, Any] = {}


class Segments(NamedTuple):
    """Settings for reading clips.

    Attributes:
        sound: whether to use the sound.
        prompts: prompts, one of which is selected by the name of a clip; empty: the captioner's.
        lengths: target and maximum length of the segments of long clips, in seconds. None: clips are not split.
        warn: called with a clip and a warning.
    """

    reading: Reading
    reader: ClipReader
    sound: bool
    prompts: tuple[str, ...]
    lengths: tuple[float, float] | None
    warn: Callable[[ClipSource, str], None]


def read_segments(
    clips: Iterable[tuple[int, ClipSource]], captioner: Captioner | None, settings: Segments
) -> Iterator[tuple[Segment, Row | Exception, int]]:
    """Read numbered clips concurrently and yield their rows as requests for `Engine.run`."""

    def read(item: tuple[Segment, Exception | None, ExitStack]) -> tuple[Row, dict[str, Any]]:
        segment, error, _ = item
        if error:
            raise error
        clip = segment.clip
        media, fields = clip.read(settings.reader, settings.reading, settings.sound, segment.part)
        if settings.prompts:
            fields = {"prompt": choose_prompt(settings.prompts, clip.name), **fields}
        row = captioner.row(media, fields)
        prefix = "from {:.0f} to {:.0f} s: ".format(*_times(segment.part)) if segment.part else ""
        for warning in clip_warnings(media, row, settings.reading):
            settings.warn(clip, prefix + warning)
        return row, {"seconds": round(media.seconds, 3), "audio": bool(len(row.clip.mel))}

    for (segment, _, copy), made in read_ahead(_segments(clips, settings), read, READERS, 2 * READERS):
        if segment.index + 1 == segment.count:
            copy.close()
        if isinstance(made, Exception):
            yield segment, made, 0
        else:
            row, record = made
            name = segment.clip.name + (f"#{segment.index}" if segment.index else "")
            yield segment._replace(prompt_ids=row.prompt_ids, record=record), row, digest(name) >> 1


def _segments(
    clips: Iterable[tuple[int, ClipSource]], settings: Segments
) -> Iterator[tuple[Segment, Exception | None, ExitStack]]:
    """Yield the segments of each clip, or an error; with an exit stack that deletes the local copy."""
    if settings.lengths is None:
        yield from ((Segment(number, clip), None, ExitStack()) for number, clip in clips)
        return

    def find(numbered: tuple[int, ClipSource]) -> tuple[list[Segment], ExitStack]:
        number, clip = numbered
        if not clip.path:  # a record of prepared shards
            return [Segment(number, clip)], ExitStack()
        with ExitStack() as stack:
            here = str(stack.enter_context(storage.local_copy(clip.path)))
            parts = clip._replace(path=here).segments(settings.reader, *settings.lengths)
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
    """Yield the segments of each clip with their captions once all are finished, or with the first error."""
    waiting: dict[int, list[tuple[Segment, Any]]] = {}
    for segment, made in results:
        found = waiting.setdefault(segment.number, [])
        found.append((segment, made))
        if len(found) == segment.count:
            parts = sorted(waiting.pop(segment.number), key=lambda part: part[0].index)
            error = next((made for _, made in parts if isinstance(made, Exception)), None)
            yield [segment for segment, _ in parts], error or [made for _, made in parts]


def caption_fields(segments: Sequence[Segment], captions: Sequence[str]) -> dict[str, Any]:
    """The output fields of a clip that was captioned in segments."""
    ends = [_times(segment.part) if segment.part else (0.0, segment.record["seconds"]) for segment in segments]
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
    """A hash of a clip's name that selects its random draws and its prompt, independent of its position in a list."""
    return zlib.crc32(os.fsencode(name))

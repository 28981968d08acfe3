"""Where a run's records come from, by the names that configs use."""

import math
import random
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from avocado_jax.config import DataConfig
from avocado_jax.data.index import Index
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.pipeline import Source
from avocado_jax.data.records import Record
from avocado_jax.data.sources import open_shards, open_tfds, prepared_reading
from avocado_jax.errors import InputError
from avocado_jax.progress import progress
from avocado_jax.world.caption import plain_caption
from avocado_jax.world.clip import record, row
from avocado_jax.world.director import make_script
from avocado_jax.world.script import LEVELS, SPLITS, Event, Script
from avocado_jax.world.voice import RATE

OPENING = ("scene", "cut", "present")  # kinds of events that last, and are told as a scene begins
WORLD_PIXELS = 28 * 28  # frames of AVWorld are read as they are rendered, however small


class WorldSource:
    """Clips straight from AVWorld's generator: no file, no decoder.

    With `part` "plain" captions are plain; with "moments" a clip is also cut to one to three of its events, and its
    caption to theirs: four times cheaper to learn from, and each word of it hangs on what is seen or heard.

    Attributes:
        index: what the batch plan needs to know of each clip.
    """

    def __init__(self, level: int, split: str, seed: int, clips: int, part: str, references: int, fps: float) -> None:
        self._asked, self._part = (seed, split, level, fps, references), part
        scripts = [make_script(seed, number, split, level) for number in progress(range(clips), "world: scripts")]
        records = [record(script, references) for script in scripts]
        spans = [(0.0, script.duration) for script in scripts]
        if part == "moments":
            spans, captions = zip(*map(moment, scripts))
            records = [made | {"references": [caption]} for made, caption in zip(records, captions)]
        height, width = LEVELS[level].size

        def column(values: Iterable) -> np.ndarray:
            return np.array(list(values), np.int32)

        self.index = Index(
            ids=[script.id for script in scripts],
            seconds=np.array([end - begin for begin, end in spans]),
            shard=np.zeros(clips, np.int32),
            position=np.arange(clips, dtype=np.int32),
            frames=column(int((end - begin) * fps + 1e-6) for begin, end in spans),
            height=np.full(clips, height, np.int32),
            width=np.full(clips, width, np.int32),
            mel=column(round((end - begin) * 100) for begin, end in spans),
            caption=column(max(len(text.encode()) for text in made["references"]) for made in records),
            prompt=column(len(made["prompt"].encode()) for made in records),
            unit="byte",
        )

    def __getitem__(self, number: int) -> Record:
        """The record of this number in the index, its clip decoded."""
        seed, split, level, fps, references = self._asked
        made = row(seed, number, split, level, fps, references)
        frames, samples, fields = made.frames, made.samples, made.record
        if self._part == "moments":
            (begin, end), caption = moment(make_script(seed, number, split, level))
            frames = frames[round(begin * fps) : round(end * fps)]
            samples = samples[round(begin * RATE) : round(end * RATE)]
            fields = fields | {"caption": caption, "references": [caption]}
        return Record(fields, Media(frames, samples, len(samples) / RATE), fields["id"])


def moment(script: Script) -> tuple[tuple[float, float], str]:
    """One to three neighbouring events of a clip: from when to when (seconds, in halves), and their plain caption.

    What is there at the beginning of a scene counts as one event of a second.
    """
    draw = random.Random(f"moment/{script.id}")
    groups: list[list[Event]] = []
    for event in script.events:
        if event.kind in OPENING and groups and groups[-1][0].kind in OPENING:
            groups[-1].append(event)
        else:
            groups.append([event])
    first = draw.randrange(len(groups))
    chosen = [event for group in groups[first : first + draw.choice((1, 1, 2, 3))] for event in group]
    ends = [event.start + 1.0 if event.kind in OPENING else event.end for event in chosen]
    begin = math.floor(chosen[0].start * 2) / 2
    end = min(max(math.ceil(max(ends) * 2) / 2, begin + 1.0), script.duration)
    return (begin, end), plain_caption(chosen)


def open_source(name: str, config: DataConfig) -> tuple[Source, Reading]:
    """The records that `name` stands for (see `DataConfig`), and how their clips are sampled.

    Raises:
        InputError: it names nothing that can be read.
    """
    if name.startswith("world:"):
        return _world(name, config), Reading(fewest_pixels=WORLD_PIXELS)
    if name.startswith("tfds:"):
        folder, _, split = name.removeprefix("tfds:").rpartition(":")
        if not config.cache_dir:
            raise InputError(f"{name}: data.cache_dir says where its measurements are kept; it is not set")
        return open_tfds(folder, split, Reading(), Path(config.cache_dir)), Reading()
    reading = prepared_reading(name)
    return open_shards(name, reading, Path(config.cache_dir) if config.cache_dir else None), reading


def _world(name: str, config: DataConfig) -> WorldSource:
    try:
        _, level, split, seed, clips, *rest = name.split(":")
        if rest not in ([], ["plain"], ["moments"]):
            raise ValueError
        asked = int(level), split, int(seed), int(clips)
    except ValueError:
        raise InputError(f"{name}: not of the form world:LEVEL:SPLIT:SEED:CLIPS[:plain or :moments]") from None
    if not 0 <= asked[0] < len(LEVELS) or split not in SPLITS or asked[3] < 1:
        raise InputError(f"{name}: levels are 0 to {len(LEVELS) - 1}, splits {' and '.join(SPLITS)}, and clips from 1")
    part = rest[0] if rest else ""
    return WorldSource(*asked, part, 0 if part else config.references, Reading().fps)

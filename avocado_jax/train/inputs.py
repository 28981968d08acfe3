"""Where a run's records come from, by the names that configs use."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from avocado_jax.config import DataConfig
from avocado_jax.data.index import Index
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.pipeline import Source
from avocado_jax.data.records import Record
from avocado_jax.data.sources import open_shards, open_tfds, prepared_reading
from avocado_jax.errors import InputError
from avocado_jax.progress import progress
from avocado_jax.world.caption import plain_caption, seen
from avocado_jax.world.clip import PROMPTS, record, row
from avocado_jax.world.director import make_script
from avocado_jax.world.drills import Drill, make_drill
from avocado_jax.world.habits import habitual_caption
from avocado_jax.world.render import render
from avocado_jax.world.script import LEVELS, SPLITS, Script
from avocado_jax.world.sound import mix
from avocado_jax.world.voice import RATE

MUTED = 8  # of so many clips of `:mixed` one has no sound
TOLD = ("plain", "mixed", "habits", "drills")
WORLD_PIXELS = 28 * 28  # frames of AVWorld are read as they are rendered, however small


class WorldSource:
    """Clips straight from AVWorld's generator: no file, no decoder.

    Attributes:
        index: what the batch plan needs to know of each clip.
    """

    def __init__(
        self, level: int, split: str, seed: int, clips: int, references: int, fps: float, told: str = ""
    ) -> None:
        """Clips that are `told` in full (""), "mixed" or with "habits", as `DataConfig` says."""
        self._asked = (seed, split, level, fps, references, told)
        scripts = [make_script(seed, number, split, level) for number in progress(range(clips), "world: scripts")]
        fields = [self._fields(number, record(script, references), script) for number, script in enumerate(scripts)]
        seconds = [script.duration for script in scripts]
        heard = [script.duration * (not self._silent(number)) for number, script in enumerate(scripts)]
        self.index = _index(scripts, fields, seconds, heard, fps)

    def _silent(self, number: int) -> bool:
        return self._asked[-1] == "mixed" and number % MUTED == 0

    def __getitem__(self, number: int) -> Record:
        """The record of this number in the index, its clip decoded."""
        seed, split, level, fps, references, _ = self._asked
        made = row(seed, number, split, level, fps, references)
        media, fields = Media(made.frames, made.samples, len(made.samples) / RATE), made.record
        if self._silent(number):
            media = media._replace(samples=None)
        fields = self._fields(number, fields, make_script(seed, number, split, level))
        return Record(fields, media, fields["id"])

    def _fields(self, number: int, fields: dict[str, Any], script: Script) -> dict[str, Any]:
        """Of a silent clip what can be seen, and none of the references that tell more."""
        if self._asked[-1] == "habits":
            return fields | {"caption": (caption := habitual_caption(script)), "references": [caption]}
        if not self._silent(number):
            return fields
        return {"id": fields["id"], "prompt": fields["prompt"], "caption": plain_caption(seen(script.events))}


class DrillSource:
    """AVWorld's drills. Attributes as `WorldSource`."""

    def __init__(self, split: str, seed: int, clips: int, fps: float) -> None:
        self._asked = (seed, split, fps)
        drills = [make_drill(seed, number, split) for number in progress(range(clips), "world: drills")]
        self.index = _index(
            [drill.script for drill in drills],
            [_drill_fields(drill) for drill in drills],
            [drill.picture for drill in drills],
            [drill.script.duration * drill.sound for drill in drills],
            fps,
        )

    def __getitem__(self, number: int) -> Record:
        """The record of this number in the index, its clip decoded."""
        seed, split, fps = self._asked
        drill = make_drill(seed, number, split)
        frames = np.stack(list(render(drill.script, np.arange(round(drill.picture * fps)) / fps)))
        samples = mix(drill.script) if drill.sound else None
        return Record(_drill_fields(drill), Media(frames, samples, drill.script.duration), drill.script.id)


def _drill_fields(drill: Drill) -> dict[str, Any]:
    return {"id": f"drill-{drill.script.id}", "caption": drill.caption, "prompt": PROMPTS[0], "system": ""}


def _index(
    scripts: list[Script], fields: list[dict[str, Any]], pictures: list[float], sounds: list[float], fps: float
) -> Index:
    """Of clips that are so many seconds of picture and sound."""

    def column(values: Iterable) -> np.ndarray:
        return np.array(list(values), np.int32)

    captions = [max([one["caption"], *one.get("references", [])], key=len) for one in fields]
    return Index(
        ids=[one["id"] for one in fields],
        seconds=np.array(pictures),
        shard=np.zeros(len(fields), np.int32),
        position=np.arange(len(fields), dtype=np.int32),
        frames=column(int(seconds * fps + 1e-6) for seconds in pictures),
        height=column(LEVELS[script.level].size[0] for script in scripts),
        width=column(LEVELS[script.level].size[1] for script in scripts),
        mel=column(round(seconds * 100) for seconds in sounds),
        caption=column(len(text.encode()) for text in captions),
        prompt=column(len((one["prompt"] + one.get("system", "")).encode()) for one in fields),
        unit="byte",
    )


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
    shards = open_shards(name, reading, Path(config.cache_dir) if config.cache_dir else None)
    shards.check()
    return shards, reading


def _world(name: str, config: DataConfig) -> WorldSource | DrillSource:
    try:
        _, level, split, seed, clips, *rest = name.split(":")
        if rest not in ([], *([kind] for kind in TOLD)) or (rest == ["drills"] and level != "0"):
            raise ValueError
        asked = int(level), split, int(seed), int(clips)
    except ValueError:
        raise InputError(
            f"{name}: not world:LEVEL:SPLIT:SEED:CLIPS, with :plain, :mixed, :habits or, of level 0, :drills"
        ) from None
    if not 0 <= asked[0] < len(LEVELS) or split not in SPLITS or asked[3] < 1:
        raise InputError(f"{name}: levels are 0 to {len(LEVELS) - 1}, splits {' and '.join(SPLITS)}, and clips from 1")
    if rest == ["drills"]:
        return DrillSource(*asked[1:], Reading().fps)
    return WorldSource(*asked, 0 if rest else config.references, Reading().fps, *rest)

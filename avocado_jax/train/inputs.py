"""The input of a run: data sources by their config names, worker processes, and monitoring of the input wait."""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from avocado_jax.config import DataConfig
from avocado_jax.data.index import Index, byte_length
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.pipeline import Source
from avocado_jax.data.reader import available_cores
from avocado_jax.data.records import Record
from avocado_jax.data.sources import open_shards, open_tfds, prepared_reading
from avocado_jax.errors import InputError
from avocado_jax.progress import progress
from avocado_jax.world.caption import plain_caption, visible_events
from avocado_jax.world.clip import PROMPTS, record, row
from avocado_jax.world.director import make_script
from avocado_jax.world.drills import Drill, make_drill
from avocado_jax.world.habits import habitual_caption
from avocado_jax.world.render import render
from avocado_jax.world.script import LEVELS, SPLITS, Script
from avocado_jax.world.sound import mix
from avocado_jax.world.voice import RATE

MUTED = 8  # every 8th clip of `:mixed` has no sound
VARIANTS = ("plain", "mixed", "habits", "timestamps", "drills")
MOST_WORKERS = 16  # default maximum; each worker needs about 0.4 GB of host memory
WARM_UP, WINDOW = 2, 20  # steps before the measurement, and steps of a measurement
WAITING = 0.2  # maximum share of time waiting for input without a warning
WORLD_PIXELS = 28 * 28  # minimum pixels of AVWorld frames, so that they are not enlarged


class WorldSource:
    """Clips from AVWorld's generator, without files or a decoder.

    Attributes:
        index: the sizes of each clip for the batch plan.
    """

    def __init__(
        self, level: int, split: str, seed: int, clips: int, references: int, fps: float, variant: str = ""
    ) -> None:
        """`variant` is "" (full captions), "mixed", "habits" or "timestamps" (`DataConfig`)."""
        self._arguments = (seed, split, level, fps, references, variant)
        scripts = [make_script(seed, number, split, level) for number in progress(range(clips), "world: scripts")]
        fields = [self._fields(number, record(script, references), script) for number, script in enumerate(scripts)]
        seconds = [script.duration for script in scripts]
        sound = [script.duration * (not self._silent(number)) for number, script in enumerate(scripts)]
        self.index = _index(scripts, fields, seconds, sound, fps)

    def _silent(self, number: int) -> bool:
        return self._arguments[-1] == "mixed" and number % MUTED == 0

    def __getitem__(self, number: int) -> Record:
        """The record with this index and its decoded clip."""
        seed, split, level, fps, references, _ = self._arguments
        clip = row(seed, number, split, level, fps, references)
        media, fields = Media(clip.frames, clip.samples, len(clip.samples) / RATE), clip.record
        if self._silent(number):
            media = media._replace(samples=None)
        fields = self._fields(number, fields, make_script(seed, number, split, level))
        return Record(fields, media, fields["id"])

    def _fields(self, number: int, fields: dict[str, Any], script: Script) -> dict[str, Any]:
        """The manifest fields. The caption of a silent clip describes only visible events."""
        if self._arguments[-1] == "habits":
            return fields | {"caption": (caption := habitual_caption(script)), "references": [caption]}
        if self._arguments[-1] == "timestamps":
            return record(script, timestamps=True)
        if not self._silent(number):
            return fields
        return {"id": fields["id"], "prompt": fields["prompt"], "caption": plain_caption(visible_events(script.events))}


class DrillSource:
    """AVWorld's drills. Attributes as `WorldSource`."""

    def __init__(self, split: str, seed: int, clips: int, fps: float) -> None:
        self._arguments = (seed, split, fps)
        drills = [make_drill(seed, number, split) for number in progress(range(clips), "world: drills")]
        self.index = _index(
            [drill.script for drill in drills],
            [_drill_fields(drill) for drill in drills],
            [drill.picture for drill in drills],
            [drill.script.duration * drill.sound for drill in drills],
            fps,
        )

    def __getitem__(self, number: int) -> Record:
        """The record with this index and its decoded clip."""
        seed, split, fps = self._arguments
        drill = make_drill(seed, number, split)
        frames = np.stack(list(render(drill.script, np.arange(round(drill.picture * fps)) / fps)))
        samples = mix(drill.script) if drill.sound else None
        return Record(_drill_fields(drill), Media(frames, samples, drill.script.duration), drill.script.id)


def _drill_fields(drill: Drill) -> dict[str, Any]:
    return {"id": f"drill-{drill.script.id}", "caption": drill.caption, "prompt": PROMPTS[0], "system": ""}


def _index(
    scripts: list[Script], fields: list[dict[str, Any]], pictures: list[float], sounds: list[float], fps: float
) -> Index:
    """Build the index of clips. `pictures` and `sounds` are the seconds of video and sound of each clip."""

    def column(values: Iterable) -> np.ndarray:
        return np.array(list(values), np.int32)

    captions = [max([clip["caption"], *clip.get("references", [])], key=len) for clip in fields]
    return Index(
        ids=[clip["id"] for clip in fields],
        seconds=np.array(pictures),
        shard=np.zeros(len(fields), np.int32),
        position=np.arange(len(fields), dtype=np.int32),
        frames=column(int(seconds * fps + 1e-6) for seconds in pictures),
        height=column(LEVELS[script.level].size[0] for script in scripts),
        width=column(LEVELS[script.level].size[1] for script in scripts),
        mel=column(round(seconds * 100) for seconds in sounds),
        caption=column(map(byte_length, captions)),
        prompt=column(byte_length(clip["prompt"] + clip.get("system", "")) for clip in fields),
        unit="byte",
    )


def input_workers(count: int) -> int:
    """The number of input processes of this host for `data.workers`.

    -1 selects half of the host's cores, at most MOST_WORKERS, with an accelerator. On CPU it selects none, since the
    step needs the cores.

    Raises:
        InputError: `count` is less than -1.
    """
    if count < -1:
        raise InputError(f"data.workers: {count} is neither a number of processes nor -1")
    if count >= 0:
        return count
    cores = available_cores()
    return 0 if jax.default_backend() == "cpu" else max(1, min(MOST_WORKERS, cores // 2))


class InputMonitor:
    """Warns once per process if the loop waits for input.

    The next batch is prefetched while a step runs, so input that is fast enough causes no wait.
    """

    def __init__(self) -> None:
        self._steps, self._waited, self._rows, self._since = -WARM_UP, 0.0, 0, 0.0
        self._warned = False

    def step(self, waited: float, rows: int) -> None:
        """Record the seconds that the loop waited for this process's rows of a step."""
        now = time.perf_counter()
        self._steps, self._waited, self._rows = self._steps + 1, self._waited + waited, self._rows + rows
        if self._steps == WINDOW:
            seconds = now - self._since
            if self._waited > WAITING * seconds and not self._warned:
                self._warned = True
                print(
                    f"process {jax.process_index()}: the last {WINDOW} steps waited for input "
                    f"{self._waited / seconds:.0%} of the time, which gives {self._rows / seconds:.2f} rows/s; raise "
                    "data.workers, or prepare the data with --features",
                    file=sys.stderr,
                    flush=True,
                )
        if self._steps in (0, WINDOW):
            self._steps, self._waited, self._rows, self._since = 0, 0.0, 0, now


def open_source(name: str, config: DataConfig) -> tuple[Source, Reading]:
    """Open the data source `name` (see `DataConfig`). Returns the records and how their clips are sampled.

    Raises:
        InputError: the source does not exist, or cannot be read.
    """
    if name.startswith("world:"):
        return _world(name, config), Reading(fewest_pixels=WORLD_PIXELS)
    if name.startswith("tfds:"):
        folder, _, split = name.removeprefix("tfds:").rpartition(":")
        if not config.cache_dir:
            raise InputError(f"{name}: data.cache_dir, the folder for its measurements, is not set")
        return open_tfds(folder, split, Reading(), Path(config.cache_dir)), Reading()
    if name.endswith((".jsonl", ".parquet", ".tar", ".csv")):
        raise InputError(f"{name}: training reads shards; make them with: avocado prepare {name} OUT")
    if not name:
        raise InputError("data.train: no data to train on: --data.train names a folder that avocado prepare has made")
    reading = prepared_reading(name)
    shards = open_shards(name, reading, Path(config.cache_dir) if config.cache_dir else None)
    shards.check()
    return shards, reading


def _world(name: str, config: DataConfig) -> WorldSource | DrillSource:
    try:
        _, level, split, seed, clips, *rest = name.split(":")
        if rest not in ([], *([kind] for kind in VARIANTS)) or (rest == ["drills"] and level != "0"):
            raise ValueError
        parsed = int(level), split, int(seed), int(clips)
    except ValueError:
        raise InputError(
            f"{name}: not world:LEVEL:SPLIT:SEED:CLIPS, with :plain, :mixed, :habits, :timestamps or, of level 0, "
            ":drills"
        ) from None
    if not 0 <= parsed[0] < len(LEVELS) or split not in SPLITS or parsed[3] < 1:
        raise InputError(f"{name}: levels are 0 to {len(LEVELS) - 1}, splits {' and '.join(SPLITS)}, and clips from 1")
    if rest == ["drills"]:
        return DrillSource(*parsed[1:], Reading().fps)
    return WorldSource(*parsed, 0 if rest else config.references, Reading().fps, *rest)

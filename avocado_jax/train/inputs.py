"""Where a run's records come from, by the names that configs use."""

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
from avocado_jax.world.clip import record, row
from avocado_jax.world.director import make_script
from avocado_jax.world.render import frame_times
from avocado_jax.world.script import LEVELS, SPLITS

WORLD_PIXELS = 28 * 28  # frames of AVWorld are read as they are rendered, however small


class WorldSource:
    """Clips straight from AVWorld's generator: no file, no decoder.

    Attributes:
        index: what the batch plan needs to know of each clip.
    """

    def __init__(self, level: int, split: str, seed: int, clips: int, references: int, fps: float) -> None:
        self._asked = (seed, split, level, fps, references)
        scripts = [make_script(seed, number, split, level) for number in progress(range(clips), "world: scripts")]
        records = [record(script, references) for script in scripts]
        height, width = LEVELS[level].size

        def column(values: list) -> np.ndarray:
            return np.array(values, np.int32)

        self.index = Index(
            ids=[script.id for script in scripts],
            seconds=np.array([script.duration for script in scripts]),
            shard=np.zeros(clips, np.int32),
            position=np.arange(clips, dtype=np.int32),
            frames=column([len(frame_times(script, fps)) for script in scripts]),
            height=np.full(clips, height, np.int32),
            width=np.full(clips, width, np.int32),
            mel=column([round(script.duration * 100) for script in scripts]),
            caption=column([max(len(text.encode()) for text in made["references"]) for made in records]),
            prompt=column([len(made["prompt"].encode()) for made in records]),
            unit="byte",
        )

    def __getitem__(self, number: int) -> Record:
        """The record of this number in the index, its clip decoded."""
        seed, split, level, fps, references = self._asked
        made = row(seed, number, split, level, fps, references)
        seconds = len(made.samples) / 16_000
        return Record(made.record, Media(made.frames, made.samples, seconds), made.record["id"])


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
        _, level, split, seed, clips, *plain = name.split(":")
        if plain not in ([], ["plain"]):
            raise ValueError
        asked = int(level), split, int(seed), int(clips)
    except ValueError:
        raise InputError(f"{name}: not of the form world:LEVEL:SPLIT:SEED:CLIPS[:plain]") from None
    if not 0 <= asked[0] < len(LEVELS) or split not in SPLITS or asked[3] < 1:
        raise InputError(f"{name}: levels are 0 to {len(LEVELS) - 1}, splits {' and '.join(SPLITS)}, and clips from 1")
    return WorldSource(*asked, 0 if plain else config.references, Reading().fps)

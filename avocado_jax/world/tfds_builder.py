"""AVWorld as a TensorFlow Datasets dataset of ArrayRecord files, without TensorFlow.

    builder = AvWorld(config="level1", data_dir=...)
    builder.download_and_prepare()          # or tfds.data_source after registering by importing this module
    source = builder.as_data_source("train")

An example has the fields of a manifest line, with lists as JSON strings, and the mp4 file. Strings are read as bytes.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import tensorflow_datasets as tfds

from avocado_jax.world.clip import record, write_clip
from avocado_jax.world.director import make_script
from avocado_jax.world.script import LEVELS, SPLITS

TEXTS = ("id", "caption", "prompt")
LISTS = ("references", "events", "dialogues", "keypoints", "probes")


@dataclass(kw_only=True)
class AvWorldConfig(tfds.core.BuilderConfig):
    """Difficulty, seed, clips per split and reference captions per clip."""

    level: int = 1
    seed: int = 0
    train_clips: int = 2000
    test_clips: int = 200
    references: int = 2


class AvWorld(tfds.core.GeneratorBasedBuilder):
    """Synthetic audiovisual clips with known events, speakers, words and times."""

    VERSION = tfds.core.Version("1.1.0")
    RELEASE_NOTES: ClassVar = {"1.1.0": "Probes.", "1.0.0": "First release."}
    BUILDER_CONFIGS: ClassVar = [AvWorldConfig(name=f"level{k}", level=k) for k in range(len(LEVELS))]

    def __init__(self, **options):
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in (*TEXTS, *LISTS)}
        features["video"] = tfds.features.Tensor(shape=(), dtype=np.object_)
        features["seconds"] = tfds.features.Scalar(np.float32)
        return self.dataset_info_from_configs(
            features=tfds.features.FeaturesDict(features),
            citation="@misc{avocado_jax_avworld,\n"
            "  title = {AVWorld: a synthetic world of audiovisual clips with known truth},\n"
            "  author = {{The avocado\\_jax authors}},\n"
            "  year = {2026},\n}",
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        counts = dict(zip(SPLITS, (self.builder_config.train_clips, self.builder_config.test_clips), strict=True))
        return {split: self._generate_examples(split, count) for split, count in counts.items()}

    def _generate_examples(self, split: str, count: int) -> Iterator[tuple[str, dict]]:
        config = self.builder_config
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "clip.mp4"
            for index in range(count):
                script = make_script(config.seed, index, split, config.level)
                made = record(script, config.references)
                write_clip(script, path)
                example = {name: made[name] for name in TEXTS}
                example |= {name: json.dumps(made[name], ensure_ascii=False) for name in LISTS}
                yield made["id"], example | {"video": path.read_bytes(), "seconds": script.duration}

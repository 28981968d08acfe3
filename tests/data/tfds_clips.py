"""A tfds data set of the clips of a manifest, as a typical builder writes it. TensorFlow is not needed."""

import json
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds


class TinyClips(tfds.core.GeneratorBasedBuilder):
    """Manifest lines with texts, lists as JSON, and the bytes of the video."""

    VERSION = tfds.core.Version("1.0.0")

    def __init__(self, manifest: str, **options) -> None:
        self.manifest = Path(manifest)
        super().__init__(file_format="array_record", **options)

    def _info(self) -> tfds.core.DatasetInfo:
        features = {name: tfds.features.Text() for name in ("id", "caption", "references")}
        features["video"] = tfds.features.Tensor(shape=(), dtype=np.object_)
        features["seconds"] = tfds.features.Scalar(np.float32)
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager) -> dict:
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for line in self.manifest.read_text().splitlines():
            record = json.loads(line)
            video = (self.manifest.parent / record["video"]).read_bytes()
            texts = {"id": record["id"], "caption": record["caption"], "references": json.dumps(record["references"])}
            yield record["id"], texts | {"video": video, "seconds": 1.0}

"""The tfds dataset: built and read with no TensorFlow."""

import json
import subprocess
import sys

from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

CODE = """
import json, sys
from avocado_jax.world.tfds_builder import AvWorld, AvWorldConfig
import tensorflow_datasets as tfds
tiny = AvWorldConfig(name="tiny", level=0, train_clips=3, test_clips=2)
builder = AvWorld(config=tiny, data_dir=sys.argv[1])
builder.download_and_prepare()
assert "avocado_jax" in builder.info.citation and str(builder.info.version) == "1.1.0"
again = tfds.builder_from_directory(str(builder.data_dir)).as_data_source("train")
assert len(again) == 3
named = tfds.data_source("av_world", split="test", data_dir=sys.argv[1], download=False,
                         builder_kwargs={"config": tiny})
assert len(named) == 2
for example in [again[0], again[1], again[2], named[0], named[1]]:
    line = {k: v.decode() for k, v in example.items() if k not in ("video", "seconds")}
    line["bytes"] = [len(example["video"]), example["video"][4:8].decode()]
    print("LINE" + json.dumps(line))
assert "tensorflow" not in sys.modules
"""


def test_dataset_is_built_and_read_without_tensorflow(tmp_path):
    run = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    lines = [json.loads(line[4:]) for line in run.stdout.splitlines() if line.startswith("LINE")]
    truth = {}
    for split, count in (("train", 3), ("test", 2)):
        for index in range(count):
            made = record(make_script(0, index, split, 0), references=2)
            truth[made["id"]] = made
    assert {line["id"] for line in lines} == set(truth)
    for line in lines:
        made = truth[line["id"]]
        assert line["caption"] == made["caption"]
        assert json.loads(line["events"]) == made["events"]
        assert json.loads(line["references"]) == made["references"]
        assert json.loads(line["probes"]) == made["probes"]
        assert line["bytes"][0] > 5000
        assert line["bytes"][1] == "ftyp"

"""A run warns if its clips are sampled differently from those of its initial checkpoint."""

import json

import pytest
from started_run import started

VALUES = {"init": "captioner", "data.train": "shards", "steps": 1, "batch": 1, "train": "all"}


@pytest.mark.parametrize("kind", ["SftConfig", "GrpoConfig"])
def test_warns_if_clip_sampling_differs_from_the_checkpoint(kind, tmp_path, monkeypatch, capsys):
    started(kind, VALUES, tmp_path, monkeypatch)  # its clips have fewest_pixels=784
    assert (
        "warning: shards was prepared with fewest_pixels=784, but captioner samples clips with fewest_pixels=100352. "
        "Unless that is intended, prepare the clips with --checkpoint captioner\n"
    ) in capsys.readouterr().err


@pytest.mark.parametrize(("train", "pixels"), [("shards", 784), ("world:0:train:0:7", 100352)])
def test_no_warning_for_equal_sampling_or_generated_clips(train, pixels, tmp_path, monkeypatch, capsys):
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "reading.json").write_text(json.dumps({"fewest_pixels": pixels}))
    started("SftConfig", VALUES | {"data.train": train}, tmp_path, monkeypatch)
    assert "warning" not in capsys.readouterr().err

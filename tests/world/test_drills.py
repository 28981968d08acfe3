"""Drills and plain captions: true, deterministic, without held-out combinations; and their sources."""

import numpy as np
import pytest

from avocado_jax.config import DataConfig
from avocado_jax.data.index import byte_length
from avocado_jax.errors import InputError
from avocado_jax.train.inputs import open_source
from avocado_jax.world.check import measure, parse
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script
from avocado_jax.world.drills import make_drill
from avocado_jax.world.script import combinations, held_out


@pytest.mark.parametrize("level", range(4))
def test_plain_captions_state_all_events(level):
    for index in range(8):
        made = record(make_script(3, index, "test", level), references=0)
        assert made["references"] == [made["caption"]]
        assert measure(made["caption"], made) == (1, 0, 1, 1)


def test_drills_are_deterministic_and_parse():
    for index in range(60):
        drill = make_drill(5, index)
        assert drill == make_drill(5, index)
        sentences = parse(drill.caption)
        assert sentences
        assert all(sentence.events for sentence in sentences)
    assert make_drill(5, 0) != make_drill(6, 0)


def test_held_out_combinations_are_not_drilled():
    found = [held_out(c) for k in range(300) for event in make_drill(1, k).script.events for c in combinations(event)]
    assert found
    assert not any(found)
    tested = [make_drill(1, index, "test").script.events for index in range(100)]
    assert any(held_out(c) for events in tested for event in events for c in combinations(event))


@pytest.mark.parametrize("name", ["world:0:train:1:12:drills", "world:0:test:1:4:plain", "world:1:train:1:3"])
def test_sources_match_their_index(name):
    source, reading = open_source(name, DataConfig(references=2))
    assert reading.fewest_pixels == 28 * 28
    for number in range(len(source.index.ids)):
        fields, clip, _ = source[number]
        index = source.index
        assert fields["id"] == index.ids[number]
        assert clip.frames.shape == (index.frames[number], index.height[number], index.width[number], 3)
        assert (0 if clip.samples is None else len(clip.samples) // 160) == index.mel[number]
        texts = [fields["caption"], *fields.get("references", [])]
        assert max(map(byte_length, texts)) == index.caption[number]
        np.testing.assert_array_equal(source[number].clip.frames, clip.frames)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("world:0:train:1", "world:LEVEL:SPLIT:SEED:CLIPS"),
        ("world:1:train:1:8:drills", "of level 0"),
        ("world:9:train:1:8", "levels are 0 to 3"),
        ("world:0:dev:1:8", "splits train and test"),
        ("tfds:folder:train", "data.cache_dir"),
        ("no/such/folder", "no/such/folder"),
    ],
)
def test_invalid_sources_are_refused(name, message):
    with pytest.raises(InputError, match=message):
        open_source(name, DataConfig())

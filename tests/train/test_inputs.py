"""Records of AVWorld straight from its generator."""

import numpy as np

from avocado_jax.config import DataConfig
from avocado_jax.train.inputs import MUTED, open_source


def test_of_mixed_clips_some_are_silent_and_told_as_seen():
    plain, _ = open_source("world:0:train:3:24:plain", DataConfig())
    mixed, _ = open_source("world:0:train:3:24:mixed", DataConfig())
    for number in (0, 1, MUTED):
        heard, record = plain[number], mixed[number]
        silent = number % MUTED == 0
        assert (record.clip.samples is None) == silent
        np.testing.assert_array_equal(record.clip.frames, heard.clip.frames)
        assert (mixed.index.mel[number] == 0) == silent
        if silent:
            assert '"' in heard.fields["caption"]
            said = [value for value in record.fields.values() if '"' in str(value)]
            assert not said  # nowhere, references included
            assert len(record.fields["caption"].encode()) == mixed.index.caption[number]
        else:
            assert record.fields == heard.fields
            assert mixed.index.mel[number] == plain.index.mel[number]

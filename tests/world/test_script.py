"""Scripts: reproducible, well formed, and disjoint between splits."""

import subprocess
import sys
from itertools import pairwise

import pytest

from avocado_jax.world.director import make_script
from avocado_jax.world.script import LEVELS, MAX_SECONDS, SPLITS, claims, combinations, held_out

ALL = [(level, split) for level in range(len(LEVELS)) for split in SPLITS]


def scripts(level, split, count=60, seed=0):
    return [make_script(seed, index, split, level) for index in range(count)]


@pytest.mark.parametrize(("level", "split"), ALL)
def test_scripts_are_well_formed(level, split):
    for script in scripts(level, split):
        assert 4 <= script.duration <= MAX_SECONDS
        assert script.duration % 0.5 == 0
        starts = [event.start for event in script.events]
        assert starts == sorted(starts)
        assert all(0 <= e.start <= e.end <= script.duration for e in script.events)
        made = [claim for event in script.events for claim in claims(event)]
        assert len(made) == len(set(made)), "a claim that is made twice is ambiguous in time"
        assert {"say", "cross"} <= {event.kind for event in script.events}
        names = [actor.name for actor in script.actors]
        assert len(names) == len(set(names))


def test_events_do_not_overlap():
    for script in scripts(2, "train"):
        beats = [e for e in script.events if e.kind not in ("scene", "cut", "present", "bed")]
        assert all(a.end < b.start for a, b in pairwise(beats))


@pytest.mark.parametrize("level", range(len(LEVELS)))
def test_held_out_combinations_occur_only_in_test_clips(level):
    def found(split):
        return [
            {c for event in script.events for c in combinations(event) if held_out(c)}
            for script in scripts(level, split, 150)
        ]

    assert not any(found("train"))
    assert all(found("test"))


def test_training_clips_have_each_part_of_held_out_combinations():
    in_train = {c for script in scripts(3, "train", 150) for e in script.events for c in combinations(e)}
    acts, lines = [c for c in in_train if len(c) == 3], [c for c in in_train if len(c) == 2]
    assert [len({c[k] for c in acts}) for k in range(3)] == [8, 8, 8]
    assert [len({c[k] for c in lines}) for k in range(2)] == [12, 12]


def test_seed_index_split_and_level_change_the_clip():
    events = [
        make_script(seed, index, split, level).events
        for seed in (0, 1)
        for index in (0, 1)
        for split in SPLITS
        for level in range(4)
    ]
    assert len(set(events)) == len(events)


def test_scripts_are_equal_in_another_process():
    code = "from avocado_jax.world.director import make_script; print(make_script(3, 5, 'test', 3))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == str(make_script(3, 5, "test", 3))

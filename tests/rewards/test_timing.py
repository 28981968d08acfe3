"""The term `timing`: intervals parsed on device and host, and time IoU of hand-computed cases."""

import itertools
import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avocado_jax.rewards.timing import event_references, find_scenes, timing_reward
from avocado_jax.rewards.vocabulary import code_points
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script
from avocado_jax.world.timing import scenes, time_iou, timed_caption

LIMIT, SIZE = 12, 1024


@jax.jit
def find_intervals(points, length):
    return find_scenes(points, length, LIMIT)


@jax.jit
def score(points, length, events):
    return timing_reward(find_scenes(points, length, LIMIT), events)


def intervals_on_device(caption):
    points, lengths = code_points([caption], SIZE)
    found = jax.tree.map(np.asarray, find_intervals(points[0], lengths[0]))
    return [(float(a), float(b)) for a, b, ok in zip(*found[:3]) if ok], bool(found.truncated)


def reward(caption, events):
    points, lengths = code_points([caption], SIZE)
    made, truncated = event_references([events], LIMIT)
    assert not truncated.any()
    return float(score(points[0], lengths[0], jax.tree.map(lambda leaf: leaf[0], made)))


def spans(*pairs):
    return [{"start": start, "end": end} for start, end in pairs]


@pytest.mark.parametrize(
    ("caption", "found"),
    [
        ("[0 - 4] A dog. [4 - 6.5] A cat.", [(0, 4), (4, 6.5)]),
        ("[00:01 - 00:03] x [01:02.5-1:00:00]", [(1, 3), (62.5, 3600)]),
        ("[1s - 2.25s] x [3S–4S] [5 — 6]", [(1, 2.25), (3, 4), (5, 6)]),
        ("[ 1 -2 ] and [3- 4]", [(1, 2), (3, 4)]),
        ("[9 - 2] counts", [(9, 2)]),
        ("[1.5 - 1.5]", [(1.5, 1.5)]),
        ("[7.] [7] [1 2] [a - b] [1 - b] [- 1] [1:2:3:4 - 5] [1.2.3 - 4] [1: 2 - 3] [1 - 2 - 3] [1 - 2", []),
        ("[[1 - 2]] [3 - 4]", [(1, 2), (3, 4)]),
        ("[music] a sign reads [2] [5 - 6]", [(5, 6)]),
        ("", []),
        ("[12 - 13", []),
        ("no times", []),
    ],
)
def test_parse_intervals(caption, found):
    assert scenes(caption) == found
    np.testing.assert_allclose(
        np.reshape(intervals_on_device(caption)[0], (-1, 2)), np.reshape(found, (-1, 2)), rtol=1e-6
    )


PIECES = [
    "[",
    "]",
    " ",
    "-",
    "–",
    ":",
    ".",
    "s",
    "0",
    "1",
    "59",
    "7.25",
    "00:07",
    "[1 - 2]",
    "[3.5 - 00:09]",
    "a",
    "\n",
]


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_device_and_host_parse_the_same_intervals(caption):
    found, truncated = intervals_on_device(caption)
    if not truncated:
        np.testing.assert_allclose(np.reshape(found, (-1, 2)), np.reshape(scenes(caption), (-1, 2)), rtol=1e-5)


def test_excess_scenes_are_reported_as_truncated():
    found, truncated = intervals_on_device("[1 - 2] " * (LIMIT + 1))
    assert (len(found), truncated) == (LIMIT, True)
    made, truncated = event_references([spans(*[(0, 1)] * 13), spans((0, 1))], 12)
    assert truncated.tolist() == [True, False]
    assert made.count.tolist() == [12, 1]


CASES = [  # caption, events, F1 by hand
    ("[0 - 2] a [2 - 4] b", spans((0, 2), (2, 4)), 1),
    ("[2 - 4] a [0 - 2] b", spans((0, 2), (2, 4)), 2 * 1 / 4),  # in the wrong order one of them counts
    ("[0 - 4]", spans((0, 2)), 2 * 0.5 / 2),
    ("[0 - 4]", spans((0, 2), (2, 4)), 2 * 0.5 / 3),  # one scene is aligned with one event
    ("[0 - 3] a [1 - 4] b", spans((1, 4), (0, 3)), 1),  # overlapping events, given in any order
    ("[0 - 10] bed [2 - 3] bell [2 - 5] move", spans((0, 10), (2, 5), (2, 3)), 1),  # same start: by end
    ("[0 - 10] bed [2 - 5] move [2 - 3] bell", spans((0, 10), (2, 5), (2, 3)), 2 * 2 / 6),
    ("[0 - 1] [1 - 3]", spans((0, 2), (2, 3)), 2 * (1 / 2 + 1 / 2) / 4),
    ("[0 - 1] [0 - 2] [0 - 3]", spans((0, 2)), 2 * 1 / 4),  # more scenes cost precision
    ("[5 - 9]", spans((0, 2)), 0),
    ("[9 - 5]", spans((0, 9)), 0),
    ("[1 - 1]", spans((1, 1)), 0),
    ("no times", spans((0, 2)), 0),
    ("", spans((0, 2)), 0),
    ("[0 - 2]", [], math.nan),
    ("[0 - 2]", [{"text": "without times"}], math.nan),
]


@pytest.mark.parametrize(("caption", "events", "f1"), CASES)
def test_time_iou_equals_values_computed_by_hand(caption, events, f1):
    assert reward(caption, events) == pytest.approx(f1, abs=1e-6, nan_ok=True)
    host = time_iou(caption, {"events": [event for event in events if "end" in event]})
    assert (math.nan if host is None else host) == pytest.approx(f1, abs=1e-6, nan_ok=True)


def best_by_search(stated, truth):
    """The highest summed IoU of any alignment in order."""

    def iou(a, b):
        overlap = max(0, min(a[1], b[1]) - max(a[0], b[0]))
        return overlap / ((a[1] - a[0]) + (b[1] - b[0]) - overlap)

    best = 0
    for count in range(min(len(stated), len(truth)) + 1):
        for rows in itertools.combinations(stated, count):
            for columns in itertools.combinations(truth, count):
                best = max(best, sum(map(iou, rows, columns)))
    return best


SPAN = st.tuples(st.integers(0, 8), st.integers(1, 5)).map(lambda pair: (pair[0], pair[0] + pair[1]))


@settings(max_examples=60, deadline=None)
@given(st.lists(SPAN, max_size=4), st.lists(SPAN, min_size=1, max_size=4))
def test_alignment_is_the_best_ordered_alignment(stated, truth):
    caption = " ".join(f"[{start} - {end}]" for start, end in stated)
    expected = 2 * best_by_search(stated, sorted(truth)) / (len(stated) + len(truth))
    assert reward(caption, spans(*truth)) == pytest.approx(expected, abs=1e-5)
    assert time_iou(caption, {"events": spans(*truth)}) == pytest.approx(expected, abs=1e-9)


def test_true_times_score_1_and_shifted_times_less():
    for index in range(8):
        script = make_script(5, index, "train", 0)
        fields = record(script, timestamps=True)
        assert fields["caption"] == timed_caption(script.events)
        assert reward(fields["caption"], fields["events"]) == pytest.approx(1, abs=1e-5)
        later = "".join(f"[{start + 1:g} - {end + 1:g}] x " for start, end in scenes(fields["caption"]))
        assert reward(later, fields["events"]) == pytest.approx(time_iou(later, fields), abs=1e-5)
        assert reward(later, fields["events"]) < 0.8

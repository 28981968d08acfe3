"""Metrics of hand-written captions; the repetition rule against an exhaustive search."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from avocado_jax.eval.metrics import collapses, text_metrics, world_metrics
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script


def test_references_score_perfectly_and_other_captions_do_not():
    records = [record(make_script(3, i, "test", i % 3), references=2) for i in range(6)]
    perfect = {"event_recall": 1, "hallucination": 0, "order": 1, "dialogue_f1": 1, "repcol": 0, "length": 10}
    for which in range(2):
        assert world_metrics([one["references"][which] for one in records], [10] * 6, records) == perfect
    empty = world_metrics([""] * 6, [0] * 6, records)
    assert (empty["event_recall"], empty["hallucination"], empty["length"]) == (0, 0, 0)
    half = world_metrics([one["caption"] for one in records[:3]] + ["A man walks his dog."] * 3, [8, None] * 3, records)
    assert half["event_recall"] == half["hallucination"] == 0.5
    assert half["length"] is None
    swapped = [one["caption"] for one in (*records[3:], *records[:3])]  # each clip's caption to another clip
    assert world_metrics(swapped, [1] * 6, records)["hallucination"] > 0.5
    assert text_metrics(["a" * 30, "fine"], [3, 4]) == {"repcol": 0.5, "length": 3.5}


def test_time_iou_is_measured_if_captions_have_times():
    """Other metrics are equal with and without times."""
    records = [record(make_script(3, i, "test", 0), timestamps=True) for i in range(4)]
    captions = [one["caption"] for one in records]
    perfect = {"event_recall": 1, "hallucination": 0, "order": 1, "dialogue_f1": 1, "repcol": 0, "length": 9}
    assert world_metrics(captions, [9] * 4, records) == perfect | {"time_iou": pytest.approx(1)}
    half = world_metrics([*captions[:2], "", "A bell rings."], [9] * 4, records)
    assert half["time_iou"] == pytest.approx(0.5)
    assert "time_iou" not in world_metrics(["A bell rings."] * 4, [9] * 4, records)


UNIT = "".join(map(chr, range(0x4E00, 0x4E00 + 120)))  # 120 distinct characters


@pytest.mark.parametrize(
    ("text", "fires"),
    [
        ("", False),
        ("00000", False),
        ("Mmmmmm, she says.", False),
        ("a" * 23, False),
        ("a" * 24, True),
        ("ab" * 11 + "a", False),
        ("ab" * 12, True),
        ("A bell. " * 4, False),
        ("A bell. " * 5, True),
        ("It starts. " + "la la, " * 5 + "and ends.", True),
        ("line\n" * 5, True),
        ("🎵" * 23, False),  # code points, not bytes or UTF-16 units
        ("🎵" * 24, True),
        (UNIT[:49] * 4 + UNIT[:48], False),
        (UNIT[:49] * 5, True),
        (UNIT[:50] * 3 + UNIT[:49], False),
        (UNIT[:50] * 4, True),
        (UNIT[:99] * 4, True),
        (UNIT[:100] * 9, False),
        ("\ud800" * 24, True),  # half a surrogate pair, as JSON may hold it
    ],
)
def test_repetition_of_known_texts(text, fires):
    assert collapses(text) == fires


def test_official_rule_has_no_minimum_span():
    assert collapses("00000", min_span=0)
    assert not collapses("0000", min_span=0)


def exhaustive_search(text, min_span):
    """The rule by exhaustive search over units and positions."""
    for unit in range(1, 100):
        for start in range(len(text) - unit + 1):
            times = 1
            while text[start + times * unit :].startswith(text[start : start + unit]):
                times += 1
            if times >= (5 if unit < 50 else 4) and times * unit >= min_span:
                return True
    return False


@given(
    st.lists(st.tuples(st.text("ab", min_size=1, max_size=9), st.integers(1, 7)), max_size=4), st.sampled_from([0, 24])
)
def test_repetition_equals_exhaustive_search(parts, min_span):
    text = "".join(unit * times for unit, times in parts)
    assert collapses(text, min_span) == exhaustive_search(text, min_span)


def test_long_units_equal_exhaustive_search():
    rng = random.Random(0)
    for unit in (48, 49, 50, 51, 98, 99, 100):
        text = "".join(rng.choice("abcd") for _ in range(unit))
        for times in (3, 4, 5):
            for offset in (0, 1):
                repeated = "xy" + (text * times)[offset:] + "zz"
                assert collapses(repeated) == exhaustive_search(repeated, 24), (unit, times, offset)


def test_adversarial_texts_take_no_longer():
    """Hundreds of thousands of characters that almost repeat: a quadratic algorithm would not finish."""
    size = 200_000
    assert collapses("a" * size)
    assert not collapses(("a" * 23 + "b") * 4 + "c" + ("ab" * 11 + "c") * 3)
    rng = random.Random(1)
    near = "".join("a" * rng.randint(1, 23) + rng.choice("bc") for _ in range(size // 12))
    collapses(near)
    bits, word = [], 0  # a de Bruijn sequence of 17 bits: every pattern of that length once
    states = {0}
    for _ in range(2**17):
        for bit in (1, 0):
            following = (word << 1 | bit) & (2**17 - 1)
            if following not in states:
                break
        states.add(following)
        word = following
        bits.append("ab"[bit])
    assert not collapses("".join(bits))

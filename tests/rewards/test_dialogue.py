"""R_D against an oracle in plain Python, and on the dialogue of AVWorld clips."""

import unicodedata
from functools import partial

import jax
import numpy as np
import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from oracles import Line
from rapidfuzz.distance import Levenshtein

from avocado_jax.rewards import dialogue, text, vocabulary
from avocado_jax.rewards.dialogue import UNIT, align, compare, dialogue_references, dialogue_reward, edit_distances
from avocado_jax.rewards.text import Limits
from avocado_jax.world.check import measure
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

LIMITS = Limits(2048, 256, 30, 400)
WHO = ("the red circle", "the blue square", "a green star")
FEW = st.text("ab你é", max_size=9)
ANY = st.one_of(st.text(max_size=400), st.text("abc", min_size=380, max_size=400), FEW)


@pytest.fixture(scope="module")
def table():
    return vocabulary.make_table()


@partial(jax.jit, static_argnums=0)
def vmap_pairs(of, caption, reference):
    return jax.vmap(of)(caption, reference)


def as_caption(lines, speakers=()):
    """A parsed caption with these lines: arrays with a leading axis of one."""
    made = [vocabulary.word_characters(line) for line in lines]
    made = [(line, who) for line, who in zip(made, speakers or [0] * len(made)) if len(line)]
    caption = text.Caption(*[None] * len(text.Caption._fields))
    shape = (1, LIMITS.quotes)
    caption = caption._replace(
        lines=np.zeros((*shape, LIMITS.line), np.int32),
        line_length=np.zeros(shape, np.int32),
        quotes=np.array([len(made)], np.int32),
        speakers=np.zeros((*shape, text.PHRASE), np.uint32),
        speaker_weights=np.zeros((*shape, text.PHRASE), np.float32),
    )
    for number, (line, who) in enumerate(made):
        caption.lines[0, number, : len(line)] = line
        caption.line_length[0, number] = len(line)
        caption.speakers[0, number, 0], caption.speaker_weights[0, number, 0] = 7 + who, 1.0
    return caption


def as_reference(table, lines, speakers=()):
    speakers = speakers or [0] * len(lines)
    given_lines = [{"speaker": "", "text": line} for line in lines]
    reference, truncated = dialogue_references(
        table, [given_lines], [None], LIMITS, alphabet=LIMITS.quotes * LIMITS.line
    )
    kept = [who for line, who in zip(lines, speakers) if len(vocabulary.word_characters(line))]
    for number, who in enumerate(kept):
        reference.speakers[0, number, 0], reference.speaker_weights[0, number, 0] = 7 + who, 1.0
    assert not truncated[0]
    return reference


def distances(caption, reference):
    needed = np.ones((LIMITS.quotes, LIMITS.quotes), bool)
    return edit_distances(caption.lines, caption.line_length, reference, needed)


def composed(line):
    return unicodedata.normalize("NFC", line)[: LIMITS.line]


@settings(max_examples=60)
@given(st.lists(ANY, max_size=6), st.lists(ANY, max_size=6))
@example(["a" * 400], ["b" * 400])
@example(["ab" * 200], ["ba" * 200])
@example(["a" * 32, "a" * 33, "a" * 64, "b" + "a" * 31], ["a" * 31, "a" * 32, "a" * 65, "a" * 399 + "b"])
def test_edit_distances_equal_rapidfuzz(table, spoken, truth):
    spoken, truth = ([one for one in map(composed, lines) if oracles.normalize(one)] for lines in (spoken, truth))
    found = np.asarray(vmap_pairs(distances, as_caption(spoken), as_reference(table, truth)))[0]
    for i, one in enumerate(spoken):
        for j, other in enumerate(truth):
            assert found[i, j] == Levenshtein.distance(oracles.normalize(one), oracles.normalize(other))


def test_long_lines_are_compared_in_blocks(table, monkeypatch):
    """Lines are longer than a block: carries cross blocks, and empty blocks are skipped."""
    monkeypatch.setattr(dialogue, "BLOCK", 4)  # 128 of 400 characters
    lines = ["ab" * 200, "a" * 129, "abc" * 43, "b" + "a" * 255]
    truth = ["ba" * 200, "a" * 128 + "b", "acb" * 42, "a" * 257, "a"]
    found = np.asarray(jax.jit(jax.vmap(distances))(as_caption(lines), as_reference(table, truth)))[0]
    assert found[:4, :5].tolist() == [[Levenshtein.distance(line, other) for other in truth] for line in lines]


def scores(caption, reference):
    pairs = compare(caption, reference)
    content, speakers = align(pairs, caption.quotes, reference.count)
    return content, speakers, dialogue_reward(caption, reference), pairs.similarity


SIMILAR = st.sampled_from(
    ["hello there", "hello here", "hallo there!", "good bye", "goodbye", "ab", "abcde", "abc", "?"]
)
SPOKEN = st.lists(st.tuples(st.one_of(SIMILAR, FEW), st.integers(0, 2)), max_size=30)


@settings(max_examples=100)
@given(SPOKEN, SPOKEN)
@example([("abcde", 0)] * 30, [("abc", 0)] * 30)
@example([], [])
@example([("a", 0)], [])
@example([], [("a", 0)])
@example([("?", 0)], [("...", 1)])
@example([("abcdefghij" * 40, 1)] * 30, [("abcdefghij" * 40, 1)] * 30)
def test_alignment_and_f1_equal_oracles(table, spoken, truth):
    spoken, truth = ([Line(composed(line), who) for line, who in lines] for lines in (spoken, truth))
    caption = as_caption(*zip(*spoken)) if spoken else as_caption([])
    reference = as_reference(table, *map(list, zip(*truth))) if truth else as_reference(table, [])
    content, speakers, f1 = (float(pair[0]) for pair in vmap_pairs(scores, caption, reference)[:3])
    expected = oracles.dialogue(spoken, truth)
    assert content / 2**UNIT == pytest.approx(expected[0], abs=1e-6)
    assert speakers == expected[1]
    assert f1 == pytest.approx(expected[2], abs=1e-6)


def test_similarity_at_the_threshold_counts(table):
    """1 - 2/5 is 0.6 and counts; 1 - 41/100 does not."""
    for n, wrong, fits in (
        (5, 2, True),
        (10, 4, True),
        (15, 6, True),
        (400, 160, True),
        (100, 41, False),
        (7, 3, False),
    ):
        reference = as_reference(table, ["a" * (n - wrong) + "b" * wrong])
        *_, similarity = vmap_pairs(scores, as_caption(["a" * n]), reference)
        assert bool(similarity[0, 0, 0] > 0) is fits, n


@pytest.mark.slow
def test_dialogue_reward_equals_the_avworld_checker():
    """On captions of the same clip R_D equals the checker's value; on captions of other clips it may be higher.

    The checker requires the exact speaker; in R_D, words around a quote let a yellow star pass as a yellow diamond.
    In one of these clips the speaker runs into another one in the clause of the quote, and that one's words are rarer.
    """
    records = [record(make_script(5, index)) for index in range(48)]
    captions = [one["caption"] for one in records]
    table = vocabulary.make_table(None, vocabulary.word_weights(captions))
    limits = Limits(2048, 320, 16, 100)
    reference, truncated = dialogue_references(table, [one["dialogues"] for one in records], [None] * 48, limits)
    assert not truncated.any()
    for shift in (0, 1):
        spoken = captions[shift:] + captions[:shift]
        found = np.asarray(vmap_pairs(dialogue_reward, text.read_texts(table, spoken, limits), reference))
        expected = np.array([measure(caption, one).dialogue_f1 for caption, one in zip(spoken, records)])
        if shift == 0:
            assert list(np.flatnonzero(~np.isclose(found, expected, atol=1e-6))) == [22]
            assert found[22] == pytest.approx(5 / 6)
        else:
            assert (found > expected - 1e-6).all()
            assert found.mean() < expected.mean() + 0.05


def test_absent_dialogues_are_nan_not_zero(table):
    alphabet = LIMITS.quotes * LIMITS.line
    unknown, silent = (dialogue_references(table, [one], [None], LIMITS, alphabet)[0] for one in (None, []))
    caption = as_caption(["a"])
    assert np.isnan(vmap_pairs(scores, caption, unknown)[2][0])
    assert vmap_pairs(scores, caption, silent)[2][0] == 0

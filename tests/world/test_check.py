"""The parser on arbitrary text, and the dialogue score against a search over all alignments."""

import re
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from avocado_jax.world import lexicon
from avocado_jax.world.check import SIMILAR, Line, dialogue_f1, measure, normalize, parse, similarity
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

RECORD = record(make_script(0, 0, "train", 2))
PIECES = [
    *RECORD["caption"].split(),
    *lexicon.CONNECTIVES,
    *(t for templates in lexicon.TEMPLATES.values() for t in templates),
    " as ",
    ", and then ",
    '"',
    "“",
    ".",
    "\n",
    "<|im_end|>",
    "\x00",
    "é字",
]


def check_bounds(caption):
    scores = measure(caption, RECORD)
    assert all(0 <= score <= 1 for score in scores)
    read = "".join(sentence.text for sentence in parse(caption))
    plain = re.sub("[“”„‟«»]", '"', caption)
    assert "".join(read.split()) == "".join(plain.split()), "no character is lost"


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=400))
def test_checker_accepts_arbitrary_text(caption):
    check_bounds(caption)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(PIECES), max_size=60).map(" ".join))
def test_checker_accepts_text_of_lexicon_phrases(caption):
    check_bounds(caption)


@pytest.mark.parametrize(
    "caption",
    [
        "a" * 1_000_000,
        '"' * 50_000,
        "A bell rings. " * 20_000,
        "a bell rings as " * 20_000,
        "the red circle jumps up and down, and then " * 20_000,
        ("as a bell rings, and then " * 22 + "no. ") * 100,
        'The red circle says, "' + "Look at the moon. " * 5_000,
        '"Look at the moon." ' * 5_000,
        "\n" * 200_000,
        "0" * 300_000 + '"mmmmm"',
    ],
    ids=range(10),
)
def test_checker_takes_seconds_for_huge_text(caption):
    check_bounds(caption)


def test_curly_quotes_and_capitals_are_ignored():
    plain = "The Red Circle says, “Look at the moon.” Then A Bell rings."
    assert [e.kind for s in parse(plain) for e in s.events] == ["say", "effect"]


def test_quote_in_an_unknown_sentence_has_no_speaker():
    lines = RECORD["dialogues"]
    caption = " ".join(f'Somebody mumbles something like "{d["text"]}" over there.' for d in lines)
    assert measure(caption, RECORD).dialogue_f1 == pytest.approx(0.5)


def best_by_search(lines, truth):
    """R_D by trying every order-preserving alignment."""
    best = (0.0, 0)
    for n in range(min(len(lines), len(truth)) + 1):
        for a in combinations(lines, n):
            for b in combinations(truth, n):
                alike = [similarity(x.text, y.text) for x, y in zip(a, b, strict=True)]
                if all(s >= SIMILAR for s in alike):
                    same = sum(x.speaker == y.speaker for x, y in zip(a, b, strict=True))
                    best = max(best, (round(sum(alike), 6), same))
    score = sum(best) / 2
    recall, precision = score / len(truth), score / len(lines)
    return 2 * recall * precision / (recall + precision) if score else 0.0


LINES = st.lists(
    st.builds(Line, st.sampled_from("ab"), st.sampled_from(["moon", "moons", "noon", "boat", "bat"])),
    min_size=1,
    max_size=5,
)


@settings(max_examples=150, deadline=None)
@given(LINES, LINES)
def test_dialogue_score_uses_the_best_alignment(lines, truth):
    assert dialogue_f1(lines, truth) == pytest.approx(best_by_search(lines, truth), abs=1e-5)


@settings(max_examples=200, deadline=None)
@given(st.text("abc", max_size=9), st.text("abc", max_size=9))
def test_similarity_is_exact_above_the_threshold(a, b):
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, start=1):
        rows.append([i])
        for j, y in enumerate(b, start=1):
            rows[i].append(min(rows[i - 1][j] + 1, rows[i][j - 1] + 1, rows[i - 1][j - 1] + (x != y)))
    exact = 1 - rows[-1][-1] / max(len(a), len(b), 1)
    found = similarity(a, b)
    assert found == exact if exact >= SIMILAR else found < SIMILAR


def test_dialogue_score_equals_values_computed_by_hand():
    moon, boat = Line("red circle", "Look at the moon!"), Line("blue star", "Where is the boat?")
    assert dialogue_f1([], []) == dialogue_f1([moon, boat], [moon, boat]) == 1
    assert dialogue_f1([moon], []) == dialogue_f1([], [moon]) == 0
    assert dialogue_f1([Line("x", "...")], []) == 1  # nothing but marks is no line
    assert dialogue_f1([boat, moon], [moon, boat]) == pytest.approx(0.5)  # only one can be aligned
    assert dialogue_f1([moon], [moon, boat]) == pytest.approx(2 / 3)
    assert dialogue_f1([moon._replace(speaker="y")], [moon]) == pytest.approx(0.5)
    assert normalize('"Look, at the MOON!"') == "lookatthemoon"
    assert similarity("kitten", "sitten") == pytest.approx(5 / 6)
    assert similarity("abcd", "wxyz") == 0

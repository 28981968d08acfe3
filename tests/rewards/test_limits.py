"""Limits derived from texts: they fit all possible speech and are bounded by the length of the text."""

import pytest

from avocado_jax.eval.rewarded import BATCH, _rows
from avocado_jax.rewards.limits import MOST, SIZES, limits_of
from avocado_jax.rewards.text import Limits
from avocado_jax.rewards.vocabulary import make_table, word_weights

LONG = "so we go on " * 60  # 720 characters
SMALL, LARGE = SIZES


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (f'A man waves. {LONG}, "Stop." {LONG} "Go," he says. {LONG}', SMALL),  # between quotes, not in them
        (f'A man says, "{LONG}"', LARGE),
        (f"A man says, “{LONG}” and goes.", LARGE),
        (f"A man says, &quot;{LONG}&quot;", LARGE),
        (f'A man says, "{LONG}\n\nA bell rings.', LARGE),  # never closed
        (f"A man says, 'Oh, {LONG}'", LARGE),
        (f"Man (off screen): {LONG}", LARGE),
        (f"A man says: Stop. {LONG}", SMALL),  # one sentence is speech
        (f"Setting: {LONG}", SMALL),  # no speaker
        ('"a" ' * 33, LARGE),
    ],
)
def test_limits_fit_possible_speech_lines(text, lines):
    found = limits_of([text])
    assert (found.quotes, found.line) == lines


def test_limits_fit_reference_lines():
    assert limits_of(["x"], [["short"], ["a" * 513]])[2:4] == LARGE
    assert limits_of(["x"], [["a"] * 33])[2:4] == LARGE
    assert limits_of(["x"], [["a"] * 32])[2:4] == SMALL


def test_limits_are_bounded_for_any_text():
    assert limits_of(["word " * 200_000]) == Limits(MOST, 8192, *SMALL)
    assert limits_of(["a " * 200_000]).words == 16384


def test_batch_size_falls_with_caption_length():
    assert _rows(Limits(1024)) == BATCH
    assert [_rows(Limits(size)) for size in (4096, 8192, MOST)] == [16, 8, 2]


def test_word_weights_have_a_fixed_shape():
    plain, rare = make_table(), make_table(None, word_weights(["a zebra runs", "a dog"]))
    assert plain.known.shape == rare.known.shape == rare.weight.shape
    assert (rare.known[1:] >= rare.known[:-1]).all()
    assert rare.weight[-1] == rare.unknown != plain.unknown

"""RepCol and R_L against plain Python."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from avocado_jax.eval import metrics
from avocado_jax.rewards.length import length_reward
from avocado_jax.rewards.repetition import collapses
from avocado_jax.rewards.vocabulary import code_points

SIZE = 1024
LOOPS = st.builds(
    lambda head, unit, times, tail: head + (unit * 400)[: round(len(unit) * times)] + tail,
    st.text("ab .", max_size=20),
    st.text("abc é你\n", min_size=1, max_size=99),
    st.floats(3, 6),
    st.text("ab .", max_size=20),
)
TEXTS = st.one_of(st.text(max_size=200), LOOPS, st.text("ab", max_size=120)).filter(lambda one: len(one) <= SIZE)


@partial(jax.jit, static_argnums=(2, 3))
def repcol_on_device(points, lengths, min_span, long_units=False):
    return jax.vmap(partial(collapses, min_span=min_span, long_units=long_units))(points, lengths)


def repcol_of(texts, min_span=24, size=SIZE, long_units=False):
    points = np.zeros((len(texts), size), np.int32)
    for row, text in zip(points, texts):
        row[: len(text)] = [ord(letter) for letter in text]
    return np.asarray(repcol_on_device(points, np.array(list(map(len, texts))), min_span, long_units)).tolist()


@pytest.mark.parametrize("min_span", [24, 0])
@settings(max_examples=60)
@given(texts=st.lists(TEXTS, min_size=8, max_size=8))
def test_repcol_of_known_texts(texts, min_span):
    expected = [oracles.collapses(text, min_span) for text in texts]
    assert repcol_of(texts, min_span) == expected
    assert [metrics.collapses(text, min_span) for text in texts] == expected


def test_repcol_at_the_threshold_of_each_unit_length():
    """For aperiodic units: the minimum number of repetitions collapses, one character less does not."""
    for first in range(1, 100, 9):
        units = range(first, min(first + 9, 100))
        unit = {n: "".join(map(chr, range(0x4E00, 0x4E00 + n))) for n in units}
        enough = {n: max((5 if n < 50 else 4) * n, 24) for n in units}
        texts = [f"a{(unit[n] * 30)[: enough[n]]}b" for n in units] + [
            f"a{(unit[n] * 30)[: enough[n] - 1]}b" for n in units
        ]
        texts += [""] * (18 - len(texts))
        assert repcol_of(texts)[: 2 * len(units)] == [True] * len(units) + [False] * len(units)


def test_repcol_with_long_units():
    """Sentences of 100 to 400 characters, three times in a row, count with `long_units` only."""
    unit = {n: "".join(map(chr, range(0x4E00, 0x4E00 + n))) for n in (99, 100, 146, 333, 400, 401)}
    texts = [f"a{(unit[n] * 3)[: 3 * n - less]}b" for n in unit for less in (0, 1)]
    size = 1280
    expected = [oracles.collapses(text, long_units=True) for text in texts]
    assert expected == [n in range(100, 401) and less == 0 for n in unit for less in (0, 1)]
    assert repcol_of(texts, size=size, long_units=True) == expected
    assert not any(repcol_of(texts, size=size))


def test_padding_after_the_text_is_ignored():
    points, lengths = code_points(["ab" * 100], SIZE)
    assert repcol_on_device(points, lengths, 24).tolist() == [True]
    assert repcol_on_device(points, np.array([20]), 24).tolist() == [False]
    assert repcol_on_device(np.zeros((1, SIZE), np.int32), np.array([0]), 24).tolist() == [False]


@given(st.integers(0, 6000), st.integers(1, 3000), st.integers(1, 3000))
@example(2047, 2048, 2048)
@example(2048, 2048, 2048)
@example(4095, 2048, 2048)
@example(4096, 2048, 2048)
def test_length_reward_of_known_lengths(tokens, low, more):
    assert float(length_reward(jnp.int32(tokens), low, low + more)) == pytest.approx(
        oracles.length(tokens, low, low + more), abs=1e-6
    )

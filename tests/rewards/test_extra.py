"""Users' reward terms: names, values and errors."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizer import write_tokenizer

from avocado_jax.errors import InputError, exit_status
from avocado_jax.rewards.combine import TERMS, make_references, score_captions
from avocado_jax.rewards.extra import load_terms
from avocado_jax.rewards.text import Limits
from avocado_jax.rewards.vocabulary import make_table

HERE = "test_extra"
LIMITS = Limits(32, 16, 2, 16)


def marks(caption, reference):
    """A device term; NaN without lines of dialogue in the reference."""
    return jnp.where(reference.dialogue.count > 0, (caption.points == ord("!")).sum(), jnp.nan)


def vector(caption, reference):
    return jnp.zeros(2)


def shouts(captions, references):
    return [text.count("!") + reference["more"] if text else None for text, reference in zip(captions, references)]


def endless(captions, references):
    return [float("inf")] * len(captions)


def too_many(captions, references):
    return [0.0] * (len(captions) + 1)


def broken(captions, references):
    raise OSError("UNAVAILABLE: no disk")


def length(captions, references):
    return []


def length_std(captions, references):
    return []


def std(captions, references):
    return []


def test_term_is_named_after_its_function_and_has_a_weight():
    first, second = load_terms([f"jax:{HERE}:marks=-0.5", f"host:{HERE}:shouts"], TERMS)
    assert (first.kind, first.name, first.weight) == ("jax", "marks", -0.5)
    assert (second.kind, second.name, second.weight) == ("host", "shouts", 1.0)


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        (["marks"], "not 'marks'"),
        ([f"cpu:{HERE}:marks"], "not 'cpu"),
        ([f"jax:{HERE}:absent"], "has no attribute 'absent'"),
        (["jax:no_such_module:marks=1"], "No module named 'no_such_module'; PYTHONPATH must name its folder"),
        ([f"jax:{HERE}:marks=much"], "'much' is not a weight"),
        ([f"jax:{HERE}:marks=nan"], "'nan' is not a weight"),
        ([f"host:{HERE}:length"], "the name length is taken"),
        ([f"host:{HERE}:length_std"], "the name length_std is taken"),  # `reward_length_std` is a metric
        ([f"host:{HERE}:std"], "the name std is taken"),
        ([f"jax:{HERE}:marks", f"jax:{HERE}:marks=2"], "the name marks is taken"),
    ],
)
def test_invalid_terms_are_refused(texts, why):
    with pytest.raises(InputError, match=why):
        load_terms(texts, TERMS)


def test_host_term_values_are_checked():
    (term,) = load_terms([f"host:{HERE}:shouts"], TERMS)
    np.testing.assert_array_equal(term.values(["a!", "", "!!"], [{"more": 1}, {}, {"more": 0}]), [2, np.nan, 2])


@pytest.mark.parametrize(
    ("name", "why"),
    [("shouts", "'more'"), ("endless", "infinite"), ("too_many", "3 values for 2"), ("broken", "UNAVAILABLE: no disk")],
)
def test_exception_in_a_term_is_not_retried(name, why):
    (term,) = load_terms([f"host:{HERE}:{name}"], TERMS)
    with pytest.raises(RuntimeError, match=f"the term host:{HERE}:{name} failed: .*{why}") as error:
        term.values(["a", "b"], [{}, {}])
    assert error.value.__cause__ is not None
    assert exit_status(error.value) == 3


@pytest.mark.slow
def test_device_term_is_scored_with_the_others(tmp_path):
    table = make_table((write_tokenizer(tmp_path, small=True) / "tokenizer.json").read_text())
    (term,) = load_terms([f"jax:{HERE}:marks"], TERMS)
    references, _ = make_references(table, [{"caption": 'A man says, "Hi!"'}, {}], LIMITS)
    tokens, lengths = np.zeros((2, 2, 8), np.int32), np.array([[3, 4]] * 2, np.int32)
    tokens[:, 0, :3], tokens[:, 1, :5] = list(b"Go!"), list(b"!Go!!")
    terms = jax.jit(partial(score_captions, limits=LIMITS, extra=[term]))(table, tokens, lengths, references)
    np.testing.assert_array_equal(terms["marks"], [[1, 2], [np.nan, np.nan]])
    assert set(terms) > {"checklist", "marks"}


def test_device_term_must_return_a_scalar():
    (term,) = load_terms([f"jax:{HERE}:vector"], TERMS)
    with pytest.raises(RuntimeError, match=f"the term jax:{HERE}:vector failed") as error:
        term.value(None, None)
    assert exit_status(error.value) == 3

"""Probes in manifests."""

import json

import pytest

from avocado_jax.data.manifest import parse_manifest
from avocado_jax.data.probes import read_probe
from avocado_jax.errors import InputError
from avocado_jax.typing import Probe

GOOD = {"question": "What barks?", "choices": ["a cat", "a dog", "no one"], "answer": "a dog"}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"answer": "B"},
        {"answer": " b. "},
        {"answer": "(B)"},
        {"choices": ["A. a cat", "B. a dog", "C: no one"]},
        {"choices": ["(A) a cat", "B) a dog", "no one"], "answer": "B) a dog"},
    ],
)
def test_answer_is_a_choice_or_its_letter(changes):
    assert read_probe(GOOD | changes) == Probe("What barks?", ("a cat", "a dog", "no one"), 1)


def test_choice_that_looks_like_a_letter_matches_the_choice():
    probe = {"question": "Which letter is shown?", "choices": ["B", "A"], "answer": "A", "category": "text"}
    assert read_probe(probe) == Probe("Which letter is shown?", ("B", "A"), 1, "text")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"question": ""}, "'question'"),
        ({"question": 3}, "'question'"),
        ({"choices": "ab"}, "'choices'"),
        ({"choices": ["a dog"]}, "2 to 10"),
        ({"choices": ["a dog", "a dog"]}, "different"),
        ({"choices": ["a dog", " "]}, "different"),
        ({"choices": list("abcdefghijk"), "answer": "a"}, "2 to 10"),
        ({"answer": "a cow"}, "neither one of the choices"),
        ({"answer": "D"}, "neither one of the choices"),
        ({"answer": 1}, "'answer'"),
        ({"category": 1}, "'category'"),
    ],
)
def test_invalid_probes_reject_the_line_with_a_reason(changes, message):
    with pytest.raises(InputError, match=message):
        read_probe(GOOD | changes)
    line = {"id": "a", "video": "v", "caption": "c", "probes": [GOOD, GOOD | changes]}
    entries, (reject,) = parse_manifest(json.dumps(line).encode())
    assert not entries
    assert message in reject.reason

"""GRPO reports at its start which reward terms have no reference."""

from types import SimpleNamespace

import numpy as np

from avocado_jax.errors import InputError
from avocado_jax.train.rewards import _warn_of_missing

PROBE = {"question": "Who speaks?", "choices": ["a man", "a dog"], "answer": "a man"}


class Source:
    """Three clips, one of which cannot be read."""

    index = SimpleNamespace(ids=["a", "b", "c"])

    def __getitem__(self, number):
        if number == 1:
            raise InputError("damaged")
        return SimpleNamespace(fields={"lines": number, "probes": [PROBE]})


def references(records):
    count = np.array([record["lines"] for record in records])
    return SimpleNamespace(keypoints=SimpleNamespace(count=count), dialogue=SimpleNamespace(count=count), events=None)


def test_terms_without_references_are_reported(capsys):
    _warn_of_missing(Source(), references, ["checklist", "length", "probes"])
    assert capsys.readouterr().err == (
        "rewards: reading the references of 2 clips\n"
        "rewards.checklist: 1 of the first 2 clips have no reference for this term, "
        "which adds nothing to their reward\n"
    )

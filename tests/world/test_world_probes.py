"""Probes of AVWorld: exactly one choice is true, and true captions answer them."""

from collections import Counter

import pytest
from probe_judge import answer, claims_of

from avocado_jax.data.probes import LABELS, read_probe
from avocado_jax.world.check import parse_sentence
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script
from avocado_jax.world.probes import FIRST, MOST


@pytest.mark.parametrize("level", range(4))
def test_only_true_captions_answer_the_probes(level):
    """Reference captions answer all probes; empty captions and those of other clips stay far below chance."""
    categories, places, other = Counter(), Counter(), []
    for index in range(12):
        script = make_script(7, index, "train", level)
        made, stranger = record(script, 2), record(make_script(8, index, "test", level), 1)
        probes = [read_probe(one) for one in made["probes"]]
        assert 4 <= len(probes) <= MOST
        assert len({(one.question, one.choices) for one in probes}) == len(probes)
        for probe in probes:
            choices = dict(zip(LABELS, probe.choices))
            assert len(choices) == 4 or probe.question == FIRST
            for caption in made["references"]:
                assert answer(caption, probe.question, choices) == LABELS[probe.right]
            assert answer("", probe.question, choices) == "N/A"
            other.append(answer(stranger["caption"], probe.question, choices) == LABELS[probe.right])
            places[probe.right] += 1
            categories[probe.category] += 1
    assert set(categories) == {"static", "dynamic", "auditory", "spatiotemporal", "crossmodal"}
    assert max(places.values()) < 0.5 * sum(places.values())  # no letter is right more often than not
    assert sum(other) < 0.25 * len(other)


def test_probes_have_one_true_choice_and_are_deterministic():
    for index in range(20):
        script = make_script(3, index, "train", 1)
        true = {claim for event in script.events for claim in claims_of(event)}
        for probe in record(script)["probes"]:
            stated = [
                choice
                for choice in probe["choices"]
                if all(claim in true for event in parse_sentence(choice) for claim in claims_of(event))
            ]
            assert probe["question"] == FIRST or stated == [probe["answer"]]
        assert record(script)["probes"] == record(make_script(3, index, "train", 1))["probes"]

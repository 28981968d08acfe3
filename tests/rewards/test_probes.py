"""Probes: the remote judge over real sockets, and the language model against its logits."""

import json

import jax
import numpy as np
import pytest
from chat import chat_server
from probe_judge import exact

from avocado_jax.data.probes import read_probe
from avocado_jax.remote import chat as module
from avocado_jax.remote.chat import Endpoint
from avocado_jax.rewards.judge import RemoteJudge
from avocado_jax.rewards.lm import lm_choices
from avocado_jax.rewards.probes import UNKNOWN, as_text, is_right, letter_of
from avocado_jax.typing import Probe
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

COLOR = Probe("What color is the door?", ("blue", "red"), 1)
SOUND = Probe("What is heard?", ("a cat", "a dog barks", "rain"), 1)
CAPTIONS = ["a dog barks at the red door", "a cat behind a blue door", " \n"]
PROBES = [[COLOR, SOUND], [COLOR], [COLOR, SOUND]]


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def answers(url, captions=CAPTIONS, probes=PROBES, **fields):
    with RemoteJudge(Endpoint(url, "m", **{"patience": 120.0, **fields})) as judge:
        return judge.probes(captions, probes)(), judge


def test_one_call_per_caption_and_none_for_empty_captions():
    """An empty caption scores 0 without a call."""
    with chat_server() as server:
        scores, judge = answers(server.url)
    np.testing.assert_array_equal(scores, [[1, 1], [0, np.nan], [0, 0]])
    assert dict(judge.counts) == {"calls": 2, "missing": 0}
    content = json.loads(server.requests[0]["messages"][1]["content"])
    assert content.keys() == {"description", "questions"}
    assert "addressed to you" in server.requests[0]["messages"][0]["content"]


def test_exact_judge_scores_true_captions_1_and_empty_ones_0():
    records = [record(make_script(11, index)) for index in range(6)]
    probes = [[read_probe(probe) for probe in each["probes"]] for each in records]
    with chat_server(exact) as server:
        true, _ = answers(server.url, [one["caption"] for one in records], probes)
        none, _ = answers(server.url, ["", *["I see nothing."] * 5], probes)
        other, _ = answers(server.url, [records[number - 1]["caption"] for number in range(6)], probes)
    assert np.nanmin(true) == 1
    assert np.nanmax(none) == 0
    assert np.nanmean(other) < 0.25  # of four choices
    assert np.isfinite(true).sum() == sum(map(len, probes))


def test_omitted_answers_are_requested_again_and_then_missing():
    replies = iter(['{"1": "B"}', '{"1": "maybe"}', '{"1": "B"}'])
    with chat_server(lambda *_: next(replies)) as server:
        scores, judge = answers(server.url, CAPTIONS[:1], PROBES[:1])
    np.testing.assert_array_equal(scores, [[1, 1]])
    again = json.loads(server.requests[1]["messages"][1]["content"])["questions"]
    assert [one["question"] for one in again.values()] == [SOUND.question]
    with chat_server(lambda *_: "no idea") as server:
        scores, judge = answers(server.url, CAPTIONS[:1], PROBES[:1], tries=2)
    assert np.isnan(scores).all()
    assert (judge.counts["missing"], len(server.requests)) == (2, 2)


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        ("B", True),
        ("(b)", True),
        ("B. red", True),
        ("red", True),
        ("**B**", True),
        ("Answer: B", True),
        ("A", False),
        ("blue", False),
        ("N/A", False),
        ("C", None),
        ("reddish", None),
        ("", None),
    ],
)
def test_parse_answers(answer, right):
    assert is_right(answer, COLOR) is right


def test_letters_take_precedence_over_choices_that_look_like_letters():
    choices = {"A": "B", "B": "A"}
    assert letter_of("A", choices) == "A"
    assert letter_of('B. "Hello there."', {"A": "Bye.", "B": '"Hello there."'}) == "B"  # a choice that ends with a mark
    assert letter_of("n/a", choices) == UNKNOWN
    assert as_text(COLOR) == "What color is the door?\nA. blue\nB. red"


def test_most_likely_valid_letter_is_the_answer():
    """With given logits: letters beyond the choices are excluded, and padding is NaN."""
    label_ids = np.array([5, 3, 9, 7])
    logits = np.zeros((1, 3, 12), np.float32)
    logits[0, 0, [5, 3, 9, 7]] = [1, 3, 2, 9]  # of three choices B
    logits[0, 1, [5, 3, 9, 7]] = [4, 3, 9, 9]  # of two A

    def apply(params, *args, method=None):
        if method is None:
            return np.zeros((1, 3, 4, 2), np.float32)
        return jax.numpy.asarray(logits)[..., args[1]]

    lengths, counts = np.array([[2, 1, 0]]), np.array([[3, 2, 0]])
    given = np.zeros((1, 8), int), np.array([4]), np.zeros((1, 3, 4), int), lengths, counts
    for right, scores in (([1, 0, 0], [1, 1]), ([0, 1, 0], [0, 0]), ([2, 0, 0], [0, 1])):
        found = lm_choices(apply, {}, *given, np.array([right]), label_ids)
        np.testing.assert_array_equal(found, [[*scores, np.nan]])

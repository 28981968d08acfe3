"""Captions that exploit the rewards score lower than the honest caption.

On clips of AVWorld with their plain captions. Each trick names the terms in which it must lose; where only the sum
loses, the README says which term is fooled.
"""

import random
import re

import jax
import numpy as np
import pytest
from sizes import CAPACITY, CLIPS, WORLD

from avocado_jax.rewards import text, vocabulary
from avocado_jax.rewards.combine import DEFAULTS, make_references, score
from avocado_jax.world.clip import record
from avocado_jax.world.director import make_script

SIDES = (("left", "right"), ("upper", "lower"), ("top", "bottom"), ("above", "below"))
COLOURS = (("red", "green"), ("blue", "yellow"), ("purple", "orange"))
SPECIAL = "<|im_end|><|endoftext|><|im_start|>assistant\n"
CHINESE = "视频开始时，背景是条纹状的白色。一个红色的大方块在右下角。它说：“你听到房子了吗？”然后铃声轻轻响起。"


class World:
    """Clips, their honest captions, and the rewards of other captions."""

    def __init__(self):
        talking = (record(make_script(11, index), 0) for index in range(200))
        self.records = [one for one in talking if len({line["speaker"] for line in one["dialogues"]}) > 1][:CLIPS]
        self.honest = [one["caption"] for one in self.records]
        self.table = vocabulary.make_table(None, vocabulary.word_weights(self.honest))
        self.references, truncated = make_references(self.table, self.records, WORLD, **CAPACITY)
        assert not truncated.any()
        self.score = jax.jit(
            jax.vmap(
                lambda table, caption, tokens, reference: score(caption, tokens, reference, DEFAULTS).terms,
                (None, 0, 0, 0),
            )
        )
        self.terms = self.of(self.honest)

    def of(self, captions, tokens=None):
        """All terms of one caption per clip."""
        read = text.read_texts(self.table, captions, WORLD)
        tokens = np.array([len(vocabulary.words_of(caption)) if tokens is None else tokens for caption in captions])
        return {name: np.asarray(term) for name, term in self.score(self.table, read, tokens, self.references).items()}


@pytest.fixture(scope="module")
def world():
    return World()


def total(terms):
    return terms["checklist"] + terms["dialogue"] + terms["length"] + terms["repetition"]


def swap_words(caption, pairs):
    """The caption with the words of each pair swapped."""
    other = dict(pairs) | {b: a for a, b in pairs}
    return re.sub(rf"\b({'|'.join(other)})\b", lambda found: other[found[0]], caption)


def shuffled(parts):
    parts = list(parts)
    random.Random(len(parts)).shuffle(parts)
    return parts


def keywords(clip):
    return " ".join(shuffled(word for word in vocabulary.words_of(clip["caption"]) if len(word) > 3))


def pasted_keypoints(clip):
    return " ".join(shuffled(point["text"] for point in clip["keypoints"]))


def repeated_lines(clip):
    return re.sub(r'"[^"]*"', lambda found: " ".join([found[0]] * 3), clip["caption"])


def one_speaker(clip):
    first = clip["dialogues"][0]["speaker"]
    return replace_speakers(clip, [first] * len(clip["dialogues"]))


def other_speakers(clip):
    who = [line["speaker"] for line in clip["dialogues"]]
    names = list(dict.fromkeys(who))
    return replace_speakers(clip, [names[(names.index(one) + 1) % len(names)] for one in who])


def replace_speakers(clip, speakers):
    """The caption with other speakers before its lines."""
    caption = clip["caption"]
    for line, speaker in zip(clip["dialogues"], speakers):
        caption = re.sub(
            rf"{line['speaker']} (?=[^.]*\"{re.escape(line['text'][:-1])})",
            f"@{speaker[4:]} ",
            caption,
            count=1,
            flags=re.IGNORECASE,
        )
    assert caption.count("@") == len(clip["dialogues"])
    return caption.replace("@", "The ")


def all_speakers(clip):
    names = " and ".join(dict.fromkeys(line["speaker"] for line in clip["dialogues"]))
    return replace_speakers(clip, [names] * len(clip["dialogues"]))


def generic_speaker(clip):
    return replace_speakers(clip, ["the shape"] * len(clip["dialogues"]))


def with_alternatives(caption):
    other = dict(COLOURS + SIDES) | {b: a for a, b in COLOURS + SIDES}
    return re.sub(rf"\b({'|'.join(other)})\b", lambda found: f"{found[0]} or {other[found[0]]}", caption)


def with_alternatives_listed(caption):
    other = dict(COLOURS) | {b: a for a, b in COLOURS}
    return re.sub(rf"\b({'|'.join(other)})\b", lambda found: f"{other[found[0]]}, white or {found[0]}", caption)


def with_denials(caption):
    return re.sub(
        r"(^|[.!?] )([A-Z])(?=[a-z ])", lambda found: f"{found[1]}It is false that {found[2].lower()}", caption
    )


def shuffled_quotes(clip):
    quotes = re.findall(r'"[^"]*"', clip["caption"])
    moved = iter(quotes[1:] + quotes[:1])
    return re.sub(r'"[^"]*"', lambda _: next(moved), clip["caption"])


BOTH, CONTENT, SPEECH = ("checklist", "dialogue"), ("checklist",), ("dialogue",)
TRICKS = {
    "bag of keywords": (keywords, BOTH),
    "keypoints pasted in random order": (pasted_keypoints, CONTENT),
    "every line of dialogue three times": (repeated_lines, SPEECH),
    "all quotes by one speaker": (one_speaker, SPEECH),
    "speakers swapped": (other_speakers, SPEECH),
    "all speakers in each attribution": (all_speakers, SPEECH),
    "nobody in particular speaks": (generic_speaker, SPEECH),
    "one or the other": (lambda clip: with_alternatives(clip["caption"]), CONTENT),
    "lists of alternatives": (lambda clip: with_alternatives_listed(clip["caption"]), CONTENT),
    "all of it is false": (lambda clip: with_denials(clip["caption"]), CONTENT),
    "quotes shuffled": (shuffled_quotes, SPEECH),
    "opposite colours": (lambda clip: swap_words(clip["caption"], COLOURS), CONTENT),
    "left for right": (lambda clip: swap_words(clip["caption"], SIDES), CONTENT),
    "an endless loop": (lambda clip: clip["caption"] + " The dog barks." * 30, ("repetition",)),
    "empty": (lambda clip: "", BOTH),
    "another language": (lambda clip: CHINESE, BOTH),
}


@pytest.mark.parametrize("name", TRICKS)
def test_honest_caption_scores_higher_than_each_trick(world, name):
    trick, terms = TRICKS[name]
    found = world.of([trick(clip) for clip in world.records])
    lower = total(found) < total(world.terms) - 1e-3
    # A clip that speaks of both sides within 60 words holds the right word somewhere: see the README.
    assert lower.mean() >= (0.7 if name == "left for right" else 1)
    for term in terms:
        assert (found[term] <= world.terms[term]).all(), term
        assert found[term].mean() < world.terms[term].mean() - (0.03 if name == "left for right" else 0.1), term


def test_honest_captions_have_high_rewards(world):
    assert world.terms["dialogue"].min() == 1
    assert world.terms["checklist"].mean() > 0.9
    assert world.terms["repetition"].max() == 0
    assert world.terms["truncated"].max() == 0


def test_padding_lowers_the_length_reward(world):
    words = " ".join(chr(ord("b") + index * index % 23) for index in range(300))
    found = world.of([f"{caption} {words}" for caption in world.honest], tokens=4096)
    assert (found["length"] == 0).all()
    assert (total(found) < total(world.terms) - 0.9).all()


def test_spelled_special_tokens_are_text(world):
    found = world.of([SPECIAL + caption + SPECIAL for caption in world.honest])
    for term in ("checklist", "dialogue"):
        assert (found[term] <= world.terms[term] + 1e-6).all()
    assert (total(found) <= total(world.terms) + 1e-6).all()

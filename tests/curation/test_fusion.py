"""Checks of fused captions: exactly the lost, altered, misplaced and added sentences are found."""

import random
import time

import pytest

from avocado_jax.curation.fusion import Faults, fusion_faults
from avocado_jax.curation.words import Sentence

VISUAL = [
    Sentence("A man in a red coat stands at a bus stop.", 0.0),
    Sentence('A sign reads "NO. 5 ONLY".', 0.0),
    Sentence("He waves at the bus, smiling.", 4.0),
    Sentence("The bus drives past him.", 6.5),
]
AUDIO = [
    Sentence("Rain falls on a roof.", 0.0),
    Sentence('The man shouts, "Wait! I’m here."', 4.5),
    Sentence("An engine roars.", 6.5),
]
GOOD = (
    'A man in a red coat stands at a bus stop. A sign reads "NO. 5 ONLY". Rain falls on a roof. Then he waves at the '
    'bus, smiling, and at the same time the man shouts, "Wait! I\'m here." Finally an engine roars as the bus drives '
    "past him."
)
NONE = Faults([], [], [], [])


def test_sentences_may_be_joined_and_connected():
    assert fusion_faults(GOOD, VISUAL, AUDIO) == NONE
    assert fusion_faults(GOOD.upper().replace(". ", "...\n\n"), VISUAL, AUDIO) == NONE
    assert fusion_faults(GOOD, VISUAL, AUDIO).message() == ""


@pytest.mark.parametrize(
    ("before", "after", "faults"),
    [
        ("Rain falls on a roof. ", "", Faults(["Rain falls on a roof."], [], [], [])),
        ("a red coat", "a long red coat", Faults([], [VISUAL[0].text], [], [])),
        ("Rain falls on a roof", "Rain is falling on a roof", Faults([], [AUDIO[0].text], [], [])),
        ("Wait! I'm here", "Wait! I'm not here", Faults([], [AUDIO[1].text], [], [])),
        ("bus, smiling, ", "bus, ", Faults([], [VISUAL[2].text], [], [])),
        ("Then he waves", "A dog barks. Then he waves", Faults([], [], [], ["A dog barks. Then"])),
        ("Then he waves", "As a dog barks he waves", Faults([], [], [], ["As a dog barks"])),
        ("past him.", "past him. The end.", Faults([], [], [], ["The end"])),
        ("past him.", "past him, then.", Faults([], [], [], ["then"])),
        ("A man in", 'Then "now" a man in', Faults([], [], [], ['Then "now'])),
        ("Finally an", "Rain falls on a roof. Finally an", Faults([], [], [], ["Rain falls on a roof. Finally"])),
    ],
)
def test_faults_of_the_fused_caption_are_named(before, after, faults):
    assert GOOD.count(before) == 1
    found = fusion_faults(GOOD.replace(before, after), VISUAL, AUDIO)
    assert found._replace(added=found.added if faults.added else []) == faults


def test_moved_sentence_is_reported_as_misplaced():
    moved = "An engine roars. " + GOOD.replace("Finally an engine roars as the", "The")
    assert len(fusion_faults(moved, VISUAL, AUDIO).misplaced) == 5  # all sentences after it
    near = [sentence._replace(start=0.5) for sentence in VISUAL]  # times are approximate
    assert fusion_faults("He waves at the bus, smiling. " + VISUAL[0].text, [near[2], VISUAL[0]], []) == NONE


def test_captions_without_times_keep_their_order():
    visual, audio = ([sentence._replace(start=None) for sentence in sentences] for sentences in (VISUAL, AUDIO))
    assert fusion_faults(GOOD, visual, audio) == NONE
    swapped = " ".join(sentence.text for sentence in (*audio, *visual[::-1]))
    assert fusion_faults(swapped, visual, audio).misplaced == [one.text for one in visual[-2::-1]]


def test_repeated_sentence_must_be_repeated():
    bell = [Sentence("A bell rings.", 1.0), Sentence("A dog barks.", 3.0), Sentence("A bell rings.", 5.0)]
    assert fusion_faults("A bell rings. A dog barks. A bell rings.", [], bell) == NONE
    assert fusion_faults("A bell rings. A dog barks.", [], bell).lost == ["A bell rings."]
    assert fusion_faults("A bell rings. A bell rings. A dog barks.", [], bell).misplaced == ["A dog barks."]
    assert fusion_faults("A bell rings. A dog barks. A bell rings. A bell rings.", [], bell).added


def test_sentence_of_both_captions_may_occur_once():
    both = [Sentence("A man sings.", 0.0)]
    assert fusion_faults("A man sings.", both, both) == NONE
    assert fusion_faults("A man sings. A man sings.", both, both) == NONE
    assert fusion_faults("A man sings. A man sings. A man sings.", both, both).added


def test_sentence_inside_a_longer_one_does_not_count():
    visual = [Sentence("A man speaks.", 0.0)]
    audio = [Sentence("A man speaks in a deep voice.", 0.0)]
    assert fusion_faults("A man speaks in a deep voice.", visual, audio).lost == ["A man speaks."]
    assert fusion_faults("A man speaks. A man speaks in a deep voice.", visual, audio) == NONE


def test_random_mixtures_are_classified_correctly():
    """Random captions of few words, so that sentences contain each other: exactly the lost ones are found."""
    rng = random.Random(0)
    for _ in range(200):
        words = ["red", "dog", "runs", "sits", "far", "42"]
        made = [
            Sentence(" ".join(rng.choices(words, k=rng.randint(3, 6))) + ".", float(2 * k))
            for k in range(rng.randint(1, 8))
        ]
        split = rng.randint(0, len(made))
        visual, audio = made[:split], made[split:]
        texts = [one.text for one in made]
        assert fusion_faults(" ".join(texts), visual, audio) == NONE, texts
        gone = rng.randrange(len(texts))
        found = fusion_faults(" ".join(texts[:gone] + texts[gone + 1 :]), visual, audio)
        once = texts.count(texts[gone]) > 1 and {texts[gone]} <= {one.text for one in visual} & {
            one.text for one in audio
        }
        assert found.lost or found.altered or once, texts


def test_adversarial_texts_are_checked_quickly():
    """An adversarial answer with the maximum number of words."""
    sentences = [Sentence(f"{'a ' * 20}{number}.", float(number)) for number in range(150)]
    start = time.process_time()
    fusion_faults("a " * 4_000, sentences, [])
    fusion_faults(" ".join(f"{number} a b." for number in range(1_500)), sentences, sentences)
    assert time.process_time() - start < 20

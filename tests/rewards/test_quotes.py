"""Dialogue in many notations: lines parsed on the device, against the parser in plain Python and known lines."""

import unicodedata

import jax
import numpy as np
import pytest
import reading
from hypothesis import given
from hypothesis import strategies as st
from sizes import ONE

from avocado_jax.rewards import text, vocabulary
from avocado_jax.rewards.limits import limits_of

MARKS = (
    " ",
    " ",
    ", ",
    ". ",
    "! ",
    "\n",
    "\n\n",
    '"',
    '"',
    '"',
    "“",
    "”",
    "‘",
    "’",
    "'",
    "'",
    "''",
    "„",
    "「",
    "」",
    "『",
    "』",
)
MARKS += (
    "«",
    "»",
    "`",
    "_",
    "*",
    "**",
    "```",
    "&quot;",
    ": ",
    ":",
    " (",
    "(",
    ") ",
    "[",
    "]",
    "...",
    "-",
    " - ",
    "\r\n",
    "，",
)
STUFF = (
    "The man says",
    "A woman",
    "The text",
    "reads ",
    "text ",
    "sign ",
    "he says",
    "she ",
    "Narrator",
    "Man",
    "**Host:** ",
)
STUFF += (
    "says: ",
    "replies",
    "and ",
    "as ",
    "then ",
    "no",
    "don't",
    "dogs' ",
    "5'10\"",
    "Stop",
    "é",
    "你好。",
    "世界",
    "İ",
    "𝒳",
)
STUFF += ("walking ", "says'No", "called ", "aloud ", "subtitle ", "in ", "the ", "with ", "1:30 ", "Hi", "go,", "♪")
TEXTS = st.lists(st.sampled_from(MARKS + STUFF), max_size=24).map("".join)


@pytest.fixture(scope="module")
def table():
    return vocabulary.make_table()


def parse_on_device(table, written, limits=ONE):
    """Parse one text on the device."""
    return jax.tree.map(lambda leaf: leaf[0], text.read_texts(table, [written], limits))


def lines_of(caption):
    """The normalised lines of dialogue."""
    return ["".join(map(chr, row[:size])) for row, size in zip(caption.lines, caption.line_length[: caption.quotes])]


@given(TEXTS)
def test_lines_equal_the_reference_parser(table, written):
    written = unicodedata.normalize("NFC", written)[: ONE.characters]
    caption = parse_on_device(table, written)
    expected = [reading.normalize(line) for line in reading.quotes(written)]
    assert caption.truncated or lines_of(caption) == expected


KNOWN = {
    "single quotes with an apostrophe": (
        "The boy shouts, 'Don't move, it's mine!' and runs.",
        ["Don't move, it's mine!"],
    ),
    "single quotes are text, double are speech": ("The text 'OPEN 24 HOURS' appears. He says, \"Hm.\"", ["Hm."]),
    "marks of two kinds": ("The girl says ''I won!\" and jumps.", ["I won!"]),
    "a mark that closes nothing": ('He says, Give it back." She cries, "No!" He asks, "Why?"', ["No!", "Why?"]),
    "a quote that is not closed": ('He says, "I never\nShe asks, "Why?"', ["I never", "Why?"]),
    "one within another": ('She says, "I saw "Jaws" again." He nods.', ['I saw "Jaws" again.']),
    "split by who speaks": ('"Wait," he whispers, "someone is there."', ["Wait, someone is there."]),
    "two sentences of one speaker": ('"Wait," he says. "Someone is there."', ["Wait,", "Someone is there."]),
    "over two lines": (
        'She sings, "The night is long,\nthe road is dark." They clap.',
        ["The night is long, the road is dark."],
    ),
    "a script": ("Reporter: It is raining.\nMan (off screen): Still?", ["It is raining.", "Still?"]),
    "a script with times": ("[00:03 - 00:05] **Old man:** Come in.", ["Come in."]),
    "a heading is no speaker": ("Setting: A quiet room.\nAudio: Music plays.", []),
    "speech behind a colon": ("The woman replies: Not today. A door closes.", ["Not today."]),
    "a label": ('A boy with a "CHAMPION" cap waves.', []),
    "a label among words of speech": ('The man says it is called "Bluebird" in English.', []),
    "a title": ('"PART TWO" appears over a black screen.', []),
    "a sign that speaks": ('A notice, a white sign, says "No entry".', []),
    "an overlay in a sentence with speech": ('A woman talks while the text overlay "TOP 3" is shown.', []),
    "text, and then a voice": ('The text "DAY 2" appears and the host says, "Good morning."', ["Good morning."]),
    "reading aloud": ('He reads aloud from the sign, "Beware of the dog."', ["Beware of the dog."]),
    "a reader": ('The teacher reads, "Once upon a time."', ["Once upon a time."]),
    "a translation in brackets": ('She says "Bonjour" ("Good day") and bows.', ["Bonjour"]),
    "an inch": ('A 27" screen. She says, "Hi."', ["Hi."]),
    "entities": ("He says, &quot;Now.&quot;", ["Now."]),
    "a code block": ('It shows:\n```\nsay("hi")\n```\nHe says, "Run it."', ["Run it."]),
    "emphasis": ("The crowd sings *we are one* again.", ["we are one"]),
    "a caption of single quotes": (
        "He asks, 'Where is it?' She says, 'Gone.' The dog looks up, 'Woof.'",
        ["Where is it?", "Gone.", "Woof."],
    ),
    "Chinese": ("他说：“你好。”然后她说：「再见」", ["你好。", "再见"]),
}


@pytest.mark.parametrize("name", KNOWN)
def test_lines_of_known_texts(table, name):
    written, expected = KNOWN[name]
    assert lines_of(parse_on_device(table, written)) == [reading.normalize(line) for line in expected]


def test_merge_joins_consecutive_lines_of_one_speaker(table):
    written = 'The red circle says, "One." The red circle adds, "Two." The blue star asks, "Three?"'
    assert lines_of(parse_on_device(table, written)) == ["one", "two", "three"]
    assert lines_of(parse_on_device(table, written, ONE._replace(merge=True))) == ["onetwo", "three"]


@pytest.mark.parametrize(
    ("written", "phrases"),
    [
        ('A boy in a cap waves. He says, "Hi."', ["boy cap"]),
        (
            'A man in red sits. A man in blue stands. The man in red says, "A." The other man says, "B."',
            ["man red", "man blue"],
        ),
        ('A deep male voice is heard. The voice says, "Hi."', ["deep man voice"]),
        ('A man and a woman say, "Hi."', ["woman"]),
        ('The man in the red and white coat says, "Hi."', ["man red white coat"]),
    ],
)
def test_speaker_phrases_of_known_texts(table, written, phrases):
    caption = parse_on_device(table, written)
    names = {
        vocabulary.hash_word(vocabulary.meaning(word)): vocabulary.meaning(word)
        for word in vocabulary.words_of(written + " man woman")
    }
    for stems, weights, phrase in zip(caption.speakers, caption.speaker_weights, phrases, strict=False):
        found = {names[int(stem)] for stem, weight in zip(stems, weights) if weight > 0}
        assert found >= {vocabulary.meaning(word) for word in phrase.split()}
    assert caption.quotes == len(phrases)


@pytest.mark.parametrize(
    ("written", "claimed"),
    [
        ("The ball is red.", "ball red"),
        ("The ball is red or blue.", ""),
        ("The ball is red, blue, green or yellow.", ""),
        ("A red/blue ball rolls.", "roll"),
        ("It is false that the dog barks. A cat sits.", "cat sit"),
        ("The dog does not bark. A cat sits.", "dog cat sit"),
        ("That the dog barks is not true. A cat sits.", "cat sit"),
        ('He says, "Tea or milk?" The dog barks.', "dog bark"),
    ],
)
def test_denied_and_alternative_words_are_not_claimed(table, written, claimed):
    caption = parse_on_device(table, written)
    names = {
        vocabulary.hash_word(vocabulary.meaning(word)): vocabulary.meaning(word)
        for word in vocabulary.words_of(written)
    }
    kept = {
        names[int(stem)]
        for stem, weight, out, start in zip(caption.stems, caption.weights, caption.unstated, caption.word_start)
        if weight > 0 and not out
    }
    for word in map(vocabulary.meaning, claimed.split()):
        assert word in kept
    denied = {"red", "blue", "yellow", "bark"} - set(claimed.split())
    assert not {vocabulary.meaning(word) for word in denied} & kept or '"' in written
    assert np.isfinite(caption.weights).all()


@pytest.mark.parametrize("line", ["Man: Hello there.\n", "She says, 'Hello there.'\n", 'She says, "Hello there."\n'])
def test_limits_fit_every_line(line):
    """Lines of scripts and in single marks count like those in double marks."""
    assert limits_of([line * 40]).quotes == 64

"""Parsing captions on the device, against tokenizers and a parser in plain Python."""

import itertools
import json
import unicodedata
from functools import partial
from pathlib import Path

import jax
import numpy as np
import oracles
import pytest
import reading
from hypothesis import given
from hypothesis import strategies as st
from sizes import ONE
from tokenizer import _ranks, special_ids, write_tokenizer

from avocado_jax.rewards import text, vocabulary

MARKS = (
    " ",
    " ",
    ", ",
    ". ",
    "! ",
    "\n",
    '"',
    '"',
    '"',
    "“",
    "”",
    "“",
    "”",
    "「",
    "」",
    "『",
    "』",
    "«",
    "»",
    "`",
    "_",
)
STUFF = (
    "The man says",
    "The text",
    "reads ",
    "no",
    "don't",
    "dogs' ",
    "5'10\"",
    "Stop",
    "é",
    "ΟΔΟΣ",
    "你好。",
    "世界",
    "İ",
    "𝒳",
    "walking ",
)
PIECES = st.sampled_from(MARKS + STUFF)
TEXTS = st.lists(PIECES, max_size=24).map("".join).filter(lambda made: len(made) <= ONE.characters)


@pytest.fixture(scope="module")
def table():
    return vocabulary.make_table()


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    folder = write_tokenizer(tmp_path_factory.mktemp("qwen"))
    return (folder / "tokenizer.json").read_text()


@pytest.fixture(scope="module")
def qwen_table(qwen):
    return vocabulary.make_table(qwen)


def quoted_lines(table, written, limits=ONE):
    """The quoted lines of one text as strings."""
    read = text.read_texts(table, [written], limits)
    points = read.points[0]
    spans = zip(read.quote_start[0][: read.quotes[0]], read.quote_end[0])
    return ["".join(map(chr, points[start:end])) for start, end in spans], bool(read.truncated[0])


def test_bytes_of_every_vocabulary_entry(qwen_table):
    starts, data = qwen_table.starts, qwen_table.data
    made = [bytes(data[a:b]) for a, b in itertools.pairwise(starts)]
    ranks = _ranks()
    assert len(ranks) == 151_643
    for token, rank in ranks.items():
        assert made[rank] == token
    for name, number in special_ids().items():
        assert made[number] == b"", name
    assert b"<tool_call>" in made[151_643:]


def test_bytes_of_a_sentencepiece_vocabulary():
    vocab = {"<unk>": 0, "</s>": 1, "<0x0A>": 2, "<0xE4>": 3, "▁the": 4, "é": 5, "<0xBD>": 6, "<0xA0>": 7}
    decoder = {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]}
    added = [{"id": one, "content": name, "special": True} for name, one in (("<unk>", 0), ("</s>", 1))]
    content = json.dumps({"model": {"type": "BPE", "vocab": vocab}, "decoder": decoder, "added_tokens": added})
    table = vocabulary.make_table(content)
    points, count = jax.jit(text.decode, static_argnums=3)(table, np.array([4, 5, 3, 6, 7, 2, 1]), np.int32(7), 32)
    assert "".join(map(chr, points[: int(count)])) == " theé你\n"
    with pytest.raises(ValueError, match="byte-level"):
        vocabulary.token_bytes(json.dumps({"model": {"type": "WordPiece", "vocab": {}}}))


def test_ids_decode_across_token_borders(qwen_table):
    table = qwen_table
    decode = jax.jit(jax.vmap(partial(text.decode, size=512), in_axes=(None, 0, 0)))
    random = np.random.default_rng(0)
    starts, data = table.starts, table.data
    broken = [one for one in range(len(starts) - 1) if data[starts[one] : starts[one + 1]].max(initial=0) >= 0x80]
    ids = random.integers(0, len(starts) + 50, (200, 24))
    ids[100:] = random.choice(broken, (100, 24))  # parts of characters, put together at random
    ids[190:] = random.integers(0, 256, (10, 24))
    lengths = random.integers(0, 25, 200)
    points, counts = decode(table, ids, lengths)
    for row, length, got, count in zip(ids, lengths, np.asarray(points), np.asarray(counts)):
        raw = b"".join(bytes(data[starts[one] : starts[one + 1]]) for one in row[:length] if one + 1 < len(starts))
        expected = raw.decode("utf-8", "replace")
        assert "".join(map(chr, got[: min(count, 512)])) == expected[:512]
        assert count == len(expected)


def test_text_beyond_a_limit_is_flagged_truncated(table, qwen_table):
    assert not quoted_lines(table, 'a "b" c "d"')[1]
    for written in ("x" * 1025, "a " * 193, '"a" ' * 13, '"' + "x" * 65 + '"'):
        assert quoted_lines(table, written)[1], written
    ids = np.full(4000, 0)  # "!"
    decode = jax.jit(text.decode, static_argnums=3)
    assert decode(qwen_table, ids, np.int32(4000), 256)[1] > 256
    assert decode(qwen_table, ids, np.int32(256), 256)[1] == 256


@given(TEXTS)
def test_quotes_equal_the_reference_parser(table, written):
    written = unicodedata.normalize("NFC", written)
    found, truncated = quoted_lines(table, written, ONE)
    lines = reading.read(written)[3]
    assert truncated or found == [written[line[0].start : line[-1].end] for line in lines]


@given(st.lists(st.text(max_size=40), max_size=3))
def test_device_words_equal_host_words(table, several):
    written = unicodedata.normalize("NFC", " walking'S ".join(several))
    read = text.read_texts(table, [written], ONE)
    expected = [vocabulary.hash_word(vocabulary.meaning(word)) for word in vocabulary.words_of(written)]
    assert read.truncated[0] or list(read.stems[0][: read.words[0]]) == expected
    word_characters = "".join(map(chr, read.word_characters[0])).rstrip("\0")
    assert read.truncated[0] or word_characters == oracles.normalize(written)


FORMS = (
    "walked walking|runs running|cities city|carried carrying|moves moving|quietly quiet|he man|children child|"
    "watches watch|falls falling|replies reply"
)


@pytest.mark.parametrize("pair", FORMS.split("|"))
def test_inflections_share_a_stem(pair):
    one, other = pair.split()
    assert vocabulary.meaning(one) == vocabulary.meaning(other)


@pytest.mark.parametrize(("one", "other"), [("car", "carry"), ("bus", "but"), ("glass", "glas"), ("sing", "s")])
def test_different_words_have_different_stems(one, other):
    assert vocabulary.meaning(one) != vocabulary.meaning(other)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ('He says, "Stop. Now!" and leaves.', ["Stop. Now!"]),
        ("It's the dogs' bowl, isn't it?", []),
        ("He says, “It's mine.”", ["It's mine."]),
        ('A 27" screen. She says, "Hi."', ["Hi."]),
        ('He says, "I never\nShe asks, "Why?"', ["I never", "Why?"]),
        ('She says, "He said “no” to me" and stops.', ["He said “no” to me"]),
        ("他说：“你好。”然后她说：「再见」", ["你好。", "再见"]),
        ('The word "MOON" appears. He says, "Sun."', ["Sun."]),
        ('The sign reads "EXIT". "Go!" shouts a man.', ["Go!"]),
        ('"" "..." "a"', ["a"]),
    ],
)
def test_quotes_of_known_texts(table, written, expected):
    assert quoted_lines(table, written)[0] == expected


@pytest.mark.parametrize(
    ("written", "phrases"),
    [
        ('The red circle says, "Hi." The blue square replies, "Hello."', ["red circle", "blue square"]),
        ('"Hi," says the red circle. A dog barks. "Go," it hears.', ["red circle", "dog barks"]),
        ('The red circle waves. "Hi." Then it goes.', ["red circle wave"]),
        ('The man says "A" and the woman says, "B"', ["man", "woman"]),
        ('As it rains, "Hi," says the girl.', ["rain girl"]),
        ('The red star hops and then remarks in a high voice, "Hi."', ["red star hops high voice"]),
        ('The circle shrinks before our eyes and then asks in a deep voice, "Hi?"', ["circle shrinks deep voice"]),
        ('The star waits while a man in red asks in a deep voice, "Hi?"', ["man red deep voice"]),
        ('"Hi."', [""]),
    ],
)
def test_speaker_phrases(table, written, phrases):
    read = text.read_texts(table, [written], ONE)
    names = {
        vocabulary.hash_word(vocabulary.meaning(word)): vocabulary.meaning(word)
        for word in vocabulary.words_of(written)
    }
    made = []
    for stems, weights in zip(read.speakers[0][: read.quotes[0]], read.speaker_weights[0]):
        front = [names[int(stem)] for stem, weight in zip(stems, weights) if weight > 0]
        made.append(set(front))
    assert made == [{vocabulary.meaning(word) for word in phrase.split()} for phrase in phrases]


def test_readme_example_terms_work(table):
    page = (Path(text.__file__).parent / "README.md").read_text()
    names = {}
    exec(page[page.index("## Your own terms") :].split("```python")[1].split("```")[0], names)
    read = text.read_texts(table, ['He asks, "Why?" She says, "So."'], ONE)
    assert float(names["questions"](jax.tree.map(lambda leaf: leaf[0], read), None)) == 0.5
    assert names["no_first_person"](["Then I left.", "A dog.", ""], [{}] * 3) == [-1, 0, None]

"""Parse captions into arrays: token ids to bytes, code points, words, sentences, quoted lines and their speakers.

    N  code points of a caption            Q  quoted lines of a caption
    W  words of a caption                  S  words of a speaker phrase

All functions take one caption of static shape; callers vmap them. Text beyond a limit is truncated, and `truncated` is
set. References are parsed by the same program (`read_texts`), so that captions and references follow the same rules.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.rewards.arrays import compact, count_before, last_index, next_index, shift
from avocado_jax.rewards.attribution import PHRASE as PHRASE
from avocado_jax.rewards.attribution import Words, find_lines, words_around
from avocado_jax.rewards.claims import unstated
from avocado_jax.rewards.quotes import Characters, Quotes, characters, find_quotes, quote_mask, sentences
from avocado_jax.rewards.speakers import same_as_before, speakers
from avocado_jax.rewards.vocabulary import (
    ALONE,
    APOSTROPHE,
    BASE,
    LOWER,
    PAGE,
    SPACE,
    SPREAD,
    UPPER,
    WORD,
    Table,
    code_points,
)
from avocado_jax.typing import Array, Bool, Float, Int

REPLACEMENT = 0xFFFD


class Limits(NamedTuple):
    """Maximum sizes of a parsed caption. Static."""

    characters: int = 8192
    words: int = 2048
    quotes: int = 32
    line: int = 400  # characters of a quoted line, normalised
    merge: bool = False  # merge consecutive lines of one speaker


def limits_for(tokens: int) -> Limits:
    """Limits that fit ordinary captions of up to `tokens` tokens."""
    return Limits(characters=max(256, 6 * tokens), words=max(64, tokens + tokens // 4))


class Caption(NamedTuple):
    """One parsed caption.

    Attributes:
        points: `length` code points, padded with 0.
        word_characters: the word characters in lower case, in order.
        stems, weights: stem hash (0 for padding) and weight of each word.
        word_start: index of each word's first character in `points`.
        unstated: words outside quotes that the caption denies or mentions as an alternative.
        quote_start, quote_end: span of each quoted line in `points`, without its marks and without on-screen text.
        lines, line_length: each quoted line as compared by R_D: word characters in lower case.
        speakers, speaker_weights: stems of the words that describe the speaker of each quote, and their weights.
        truncated: whether the caption exceeded a limit.
    """

    points: Int[Array, "N"]
    length: Int[Array, ""]
    word_characters: Int[Array, "N"]
    stems: Int[Array, "W"]
    weights: Float[Array, "W"]
    word_start: Int[Array, "W"]
    words: Int[Array, ""]
    unstated: Bool[Array, "W"]
    quote_start: Int[Array, "Q"]
    quote_end: Int[Array, "Q"]
    quotes: Int[Array, ""]
    lines: Int[Array, "Q line"]
    line_length: Int[Array, "Q"]
    speakers: Int[Array, "Q S"]
    speaker_weights: Float[Array, "Q S"]
    truncated: Bool[Array, ""]


@partial(jax.jit, static_argnums=3)
def _read_points(table: Table, points: jax.Array, lengths: jax.Array, limits: Limits) -> Caption:
    return jax.vmap(partial(parse, limits=limits), in_axes=(None, 0, 0))(table, points, lengths)


def read_texts(table: Table, texts: Sequence[str], limits: Limits) -> Caption:
    """Parse texts on the host with the program for captions. Leaves are numpy arrays with a leading text axis."""
    full = [*texts, *[""] * ((1 << (len(texts) - 1).bit_length()) - len(texts))]  # few shapes
    points, lengths = code_points(full, limits.characters)
    return jax.tree.map(lambda leaf: np.asarray(leaf)[: len(texts)], _read_points(table, points, lengths, limits))


def read(table: Table, ids: Int[Array, "C"], length: Int[Array, ""], limits: Limits) -> Caption:
    """Parse one caption from its first `length` token ids."""
    points, points_length = decode(table, ids, length, limits.characters)
    return parse(table, points, points_length, limits)


def decode(
    table: Table, ids: Int[Array, "C"], length: Int[Array, ""], size: int
) -> tuple[Int[Array, "N"], Int[Array, ""]]:
    """Decode token ids to at most `size` code points; also return their number, larger than `size` if truncated.

    Bytes that are not UTF-8 become U+FFFD, as with Python's `errors="replace"`.
    """
    capacity = 4 * size if size < 2048 else 2 * size + 4096  # in bytes: other scripts than Latin take up to 3 per point
    valid = (jnp.arange(len(ids)) < length) & (ids >= 0) & (ids < len(table.starts) - 1)
    known = jnp.where(valid, ids, 0)
    begin = table.starts[known]
    count = jnp.where(valid, table.starts[known + 1] - begin, 0)
    ends = jnp.cumsum(count)
    position = jnp.arange(capacity)
    token = jnp.zeros(capacity + 1, jnp.int32).at[jnp.minimum(ends, capacity)].add(1)
    token = jnp.minimum(jnp.cumsum(token[:capacity]), len(ids) - 1)
    byte = table.data[jnp.clip(begin[token] + position - (ends - count)[token], 0, len(table.data) - 1)].astype(
        jnp.int32
    )
    inside = position < ends[-1]
    byte = jnp.where(inside, byte, 0)
    one, two, three = (jnp.concatenate([byte[k:], jnp.zeros(k, jnp.int32)]) for k in (1, 2, 3))
    need = (byte >= 0xC2).astype(jnp.int32) + (byte >= 0xE0) + (byte >= 0xF0)
    need = jnp.where(byte > 0xF4, 0, need)
    least = jnp.where(byte == 0xE0, 0xA0, jnp.where(byte == 0xF0, 0x90, 0x80))
    most = jnp.where(byte == 0xED, 0x9F, jnp.where(byte == 0xF4, 0x8F, 0xBF))
    right = [(one >= least) & (one <= most), (two & 0xC0) == 0x80, (three & 0xC0) == 0x80]
    follow = jnp.zeros_like(byte)  # number of continuation bytes of this character
    for k, fits in enumerate(right):
        follow = jnp.where((follow == k) & (need > k) & fits, k + 1, follow)
    taken = jnp.zeros(capacity, bool)
    for k in (1, 2, 3):
        taken |= jnp.concatenate([jnp.zeros(k, bool), follow[:-k] >= k])
    tail = [byte & 0x1F, byte & 0x0F, byte & 0x07]
    point = jnp.select(
        [need == 0, need == 1, need == 2],
        [
            byte,
            (tail[0] << 6) | (one & 0x3F),
            (tail[1] << 12) | ((one & 0x3F) << 6) | (two & 0x3F),
        ],
        (tail[2] << 18) | ((one & 0x3F) << 12) | ((two & 0x3F) << 6) | (three & 0x3F),
    )
    point = jnp.where((follow < need) | ((need == 0) & (byte >= 0x80)), REPLACEMENT, point)
    points, total = compact(inside & ~taken, point, size)
    # Code points beyond the capacity are not counted: report `size + 1` at least.
    return points, jnp.where(ends[-1] > capacity, jnp.maximum(total, size + 1), total)


class Outline(NamedTuple):
    """The words and quotes of a caption.

    Attributes:
        text: its code points and lines.
        letter: mask of word characters.
        lower: all code points in lower case.
        word_characters: the word characters in lower case, in order.
        words, count: the words up to the limit, and the number of all words.
        first: mask of the first characters of words.
        quotes: quotes, including on-screen text.
        quoted, sentence: whether each code point is inside a quote, and its sentence number.
        unstated: words outside quotes that the caption denies or mentions as an alternative.
    """

    text: Characters
    letter: Bool[Array, "N"]
    lower: Int[Array, "N"]
    word_characters: Int[Array, "N"]
    words: Words
    count: Int[Array, ""]
    first: Bool[Array, "N"]
    quotes: Quotes
    quoted: Bool[Array, "N"]
    sentence: Int[Array, "N"]
    unstated: Bool[Array, "W"]


def outline(table: Table, points: Int[Array, "N"], length: Int[Array, ""], limits: Limits) -> Outline:
    """Find the words and quotes of one caption. `length` may exceed the array if the text was truncated."""
    places = jnp.arange(len(points), dtype=jnp.int32)
    inside = places < length
    points = jnp.where(inside, points, 0)
    page, offset = table.page[points >> 8], points & (PAGE - 1)
    kind = jnp.where(inside, table.kind[page, offset], SPACE)
    lower = points + table.lower[page, offset]
    letter = (kind & WORD) > 0
    word_characters, _ = compact(letter, lower, len(points))
    words, count, first = _words(table, kind, word_characters, limits.words)

    text = characters(points, kind, length)
    quotes = find_quotes(text, (words.start, words.classes, words.real), 4 * limits.quotes, 2 * limits.quotes)
    quoted = quote_mask(quotes.start, quotes.end, quotes.kind, len(points))
    sentence = sentences(text, quoted)
    denied = unstated(text, words, quoted, sentence)
    return Outline(text, letter, lower, word_characters, words, count, first, quotes, quoted, sentence, denied)


def parse(table: Table, points: Int[Array, "N"], length: Int[Array, ""], limits: Limits) -> Caption:
    """Parse one caption from its code points. `length` may exceed the array if the text was truncated."""
    text, letter, lower, word_characters, words, count, first, quotes, quoted, sentence, denied = outline(
        table, points, length, limits
    )
    points = text.points
    near = words_around(text, words, quoted, sentence, quotes)
    begun = count_before(first)
    spoken, goes_on = find_lines(text, quotes, near, sentence, begun[quotes.end] - begun[quotes.start])
    phrases, phrase_weights = speakers(near, quotes)

    # A line is a quote with the quotes that continue it.
    begins = spoken & ~goes_on
    if limits.merge:
        begins &= ~same_as_before(spoken, phrases, phrase_weights)
    number = jnp.arange(len(spoken), dtype=jnp.int32)
    order, lines = compact(begins, number, limits.quotes)
    until = shift(next_index(begins), -1, len(spoken))[order]  # index of the quote that begins the next line
    last = last_index(spoken)[until - 1]
    real = jnp.arange(limits.quotes) < lines
    in_speech = letter & quote_mask(quotes.start, quotes.end, jnp.where(spoken, quotes.kind, 0), len(points))
    speech, _ = compact(in_speech, lower, len(points))
    speech_count = count_before(in_speech)

    def keep(values: Array) -> Array:
        return jnp.where(real.reshape(-1, *[1] * (values.ndim - 1)), values, 0)

    begin = speech_count[quotes.start[order]]
    line_length = keep(speech_count[quotes.end[last]] - begin)
    columns = jnp.arange(limits.line)[None]
    characters_of = speech[jnp.minimum(begin[:, None] + columns, len(points) - 1)]
    return Caption(
        points,
        jnp.minimum(length, len(points)).astype(jnp.int32),
        word_characters,
        words.stems,
        words.weights,
        words.start,
        jnp.minimum(count, limits.words),
        denied,
        keep(quotes.start[order]),
        keep(quotes.end[last]),
        jnp.minimum(lines, limits.quotes),
        jnp.where(columns < line_length[:, None], characters_of, 0),
        jnp.minimum(line_length, limits.line),
        keep(phrases[order]),
        keep(phrase_weights[order]),
        (length > len(points))
        | (count > limits.words)
        | quotes.truncated
        | (lines > limits.quotes)
        | jnp.any(line_length > limits.line),
    )


def _words(table: Table, kind: Array, word_characters: Array, most: int) -> tuple[Words, Array, Array]:
    """The first `most` words, the number of all words, and the mask of their first characters."""
    letter = (kind & WORD) > 0
    before, before2 = shift(kind, 1, SPACE), shift(kind, 2, SPACE)
    bridged = ((before & APOSTROPHE) > 0) & ((before2 & WORD) > 0)
    bridged &= ~(((before2 & LOWER) > 0) & ((kind & UPPER) > 0))  # says'No
    last = jnp.where(bridged, before2, before)
    continues = ((last & WORD) > 0) & ((last & ALONE) == 0) & ((kind & ALONE) == 0)
    first = letter & ~continues
    start, count = compact(first, jnp.arange(len(kind), dtype=jnp.int32), most)
    cumulative = count_before(letter)
    begin, _ = compact(first, cumulative[:-1], most + 1)
    begin = jnp.where(jnp.arange(most + 1) < count, begin, cumulative[-1])
    real = jnp.arange(most) < count
    stems, pronoun = _meaning(table, word_characters, begin[:-1], begin[1:])
    stems = jnp.where(real, stems, 0)
    at = jnp.minimum(jnp.searchsorted(table.classed, stems), len(table.classed) - 1)
    classes = jnp.where(table.classed[at] == stems, table.classes[at], 0)
    return Words(start, stems, jnp.where(real, weight_of(table, stems), 0), classes, pronoun & real, real), count, first


def contains(ordered: Int[Array, "n"], values: Array) -> Array:
    """Mask of the values that are in a sorted array."""
    at = jnp.minimum(jnp.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[at] == values


def weight_of(table: Table, stems: Array) -> Array:
    """Look up the weights of stems."""
    at = jnp.minimum(jnp.searchsorted(table.known, stems), len(table.known) - 1)
    return jnp.where(table.known[at] == stems, table.weight[at], table.unknown)


def _meaning(table: Table, word_characters: Array, begin: Array, end: Array) -> tuple[Array, Array]:
    """Stem hashes, as `vocabulary.meaning`, of the words at word_characters[begin:end]; and a mask of pronouns."""
    n = len(word_characters)
    powers = np.cumprod(np.r_[1, np.full(n - 1, BASE)].astype(np.uint32), dtype=np.uint32)
    inverse = np.cumprod(np.r_[1, np.full(n - 1, pow(BASE, -1, 1 << 32))].astype(np.uint32), dtype=np.uint32)
    mixed = (word_characters.astype(jnp.uint32) + 1) * np.uint32(SPREAD)
    prefix_hashes = jnp.cumsum((mixed ^ (mixed >> 15)) * powers, dtype=jnp.uint32)
    prefix_hashes = jnp.concatenate([jnp.zeros(1, jnp.uint32), prefix_hashes])

    length = end - begin

    def ends_with(ending: str, least: int) -> Array:
        fits = length >= least
        for k, letter in enumerate(reversed(ending), start=1):
            fits &= word_characters[jnp.clip(begin + length - k, 0, n - 1)] == ord(letter)
        return fits

    def last(k: int) -> Array:
        return word_characters[jnp.clip(begin + length - k, 0, n - 1)]

    def is_in(value: Array, alphabet: str) -> Array:
        return (value[..., None] == np.array([[ord(letter) for letter in alphabet]])).any(-1)

    length = length - (ends_with("s", 4) & ~is_in(last(2), "sui"))
    ing = ends_with("ing", 6)
    ed = ends_with("ed", 5)
    length = length - jnp.where(ing, 3, jnp.where(ed, 2, 0))
    doubled = (ing | ed) & (last(1) == last(2)) & ~is_in(last(1), "lsz")
    length = length - jnp.where(doubled, 1, jnp.where(~doubled & ends_with("ly", 6), 2, 0))
    length = length - ends_with("e", 4)
    length = length - (ends_with("y", 4) | ends_with("i", 4))
    begin = jnp.clip(begin, 0, n - 1)
    hashed = (prefix_hashes[jnp.clip(begin + length, 0, n)] - prefix_hashes[begin]) * jnp.asarray(inverse)[begin]
    hashed = jnp.where(hashed == 0, 1, hashed)
    at = jnp.minimum(jnp.searchsorted(table.forms, hashed), len(table.forms) - 1)
    return jnp.where(table.forms[at] == hashed, table.becomes[at], hashed), contains(table.pronouns, hashed)

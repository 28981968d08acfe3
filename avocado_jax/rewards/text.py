"""Captions as arrays: token ids to bytes, code points, words, sentences, quoted lines and who is said to speak them.

    N  code points of a caption            Q  quoted lines of a caption
    W  words of a caption                  S  words of a speaker phrase

Everything is for one caption, of static shape, and is vmapped by those who call it. What does not fit a limit is cut,
and `truncated` says so. The same program reads references (`read_texts`), so that both sides follow one set of rules.
"""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from avocado_jax.rewards.vocabulary import (
    ALONE,
    APOSTROPHE,
    BASE,
    CLOSER,
    CORNER,
    CORNER_END,
    DIGIT,
    LEFT,
    LOWER,
    MARK,
    NEWLINE,
    PAGE,
    RIGHT,
    SPACE,
    SPREAD,
    STOP,
    STOP_CJK,
    STRAIGHT,
    WHITE,
    WHITE_END,
    WORD,
    Table,
    code_points,
)
from avocado_jax.typing import Array, Bool, Float, Int

REPLACEMENT = 0xFFFD
BEFORE, AFTER = 24, 8  # words of a speaker phrase before and after its quote
PHRASE = BEFORE + AFTER


class Limits(NamedTuple):
    """How much of a caption is read. Static."""

    characters: int = 8192
    words: int = 2048
    quotes: int = 32
    line: int = 400  # characters of a quoted line, normalised


def limits_for(tokens: int) -> Limits:
    """Limits that ordinary captions of up to so many tokens stay within."""
    return Limits(characters=max(256, 6 * tokens), words=max(64, tokens + tokens // 4))


class Caption(NamedTuple):
    """One caption, read.

    Attributes:
        points: its code points, 0 past the end; `length` of them.
        letters: the word characters in lower case, one after another.
        stems, weights: of each word: its hash (0 past the end) and how much it says.
        word_start: where each word begins in `points`.
        negated: words that a negation stands shortly before, outside quotes.
        quote_start, quote_end: each quoted line, without its marks, in `points`; on-screen text is not among them.
        lines, line_length: each quoted line as R_D compares it: word characters in lower case.
        speakers, speaker_weights: words around each quote, outside of quotes, and how much they say of who speaks.
        truncated: something did not fit the limits.
    """

    points: Int[Array, "N"]
    length: Int[Array, ""]
    letters: Int[Array, "N"]
    stems: Int[Array, "W"]
    weights: Float[Array, "W"]
    word_start: Int[Array, "W"]
    words: Int[Array, ""]
    negated: Bool[Array, "W"]
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
    """Texts of the host read as captions are: leaves are numpy arrays with a leading axis of texts."""
    points, lengths = code_points(texts, limits.characters)
    return jax.tree.map(np.asarray, _read_points(table, points, lengths, limits))


def read(table: Table, ids: Int[Array, "C"], length: Int[Array, ""], limits: Limits) -> Caption:
    """Read one caption from its first `length` token ids."""
    points, points_length = decode(table, ids, length, limits.characters)
    return parse(table, points, points_length, limits)


def decode(
    table: Table, ids: Int[Array, "C"], length: Int[Array, ""], size: int
) -> tuple[Int[Array, "N"], Int[Array, ""]]:
    """Token ids to at most `size` code points, and how many there are (more than `size` where they are cut).

    Bytes that are not UTF-8 become U+FFFD as Python's `errors="replace"` has it.
    """
    room = 4 * size if size < 2048 else 2 * size + 4096  # bytes: text that is not Latin takes up to three each
    valid = (jnp.arange(len(ids)) < length) & (ids >= 0) & (ids < len(table.starts) - 1)
    known = jnp.where(valid, ids, 0)
    begin = table.starts[known]
    count = jnp.where(valid, table.starts[known + 1] - begin, 0)
    ends = jnp.cumsum(count)
    place = jnp.arange(room)
    token = jnp.zeros(room + 1, jnp.int32).at[jnp.minimum(ends, room)].add(1)
    token = jnp.minimum(jnp.cumsum(token[:room]), len(ids) - 1)
    byte = table.data[jnp.clip(begin[token] + place - (ends - count)[token], 0, len(table.data) - 1)].astype(jnp.int32)
    inside = place < ends[-1]
    byte = jnp.where(inside, byte, 0)
    one, two, three = (jnp.concatenate([byte[k:], jnp.zeros(k, jnp.int32)]) for k in (1, 2, 3))
    need = (byte >= 0xC2).astype(jnp.int32) + (byte >= 0xE0) + (byte >= 0xF0)
    need = jnp.where(byte > 0xF4, 0, need)
    least = jnp.where(byte == 0xE0, 0xA0, jnp.where(byte == 0xF0, 0x90, 0x80))
    most = jnp.where(byte == 0xED, 0x9F, jnp.where(byte == 0xF4, 0x8F, 0xBF))
    right = [(one >= least) & (one <= most), (two & 0xC0) == 0x80, (three & 0xC0) == 0x80]
    follow = jnp.zeros_like(byte)  # bytes after this one that belong to its character
    for k, fits in enumerate(right):
        follow = jnp.where((follow == k) & (need > k) & fits, k + 1, follow)
    taken = jnp.zeros(room, bool)
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
    # What lies beyond the bytes that are looked at is not counted but known to be there.
    return points, jnp.where(ends[-1] > room, jnp.maximum(total, size + 1), total)


def compact(mask: Bool[Array, "n"], values: Array, size: int) -> tuple[Array, Int[Array, ""]]:
    """The values under a mask one after another, zeros behind them, and how many there are (which may exceed size)."""
    count = jnp.cumsum(mask)
    at = jnp.where(mask, count - 1, size)
    return jnp.zeros(size, values.dtype).at[at].set(values, mode="drop"), count[-1]


def parse(table: Table, points: Int[Array, "N"], length: Int[Array, ""], limits: Limits) -> Caption:
    """Read one caption from its code points; `length` may exceed what there is of them."""
    places = jnp.arange(len(points), dtype=jnp.int32)
    inside = places < length
    points = jnp.where(inside, points, 0)
    page, place = table.page[points >> 8], points & (PAGE - 1)
    kind = jnp.where(inside, table.kind[page, place], SPACE)
    lower = points + table.lower[page, place]
    letter = (kind & WORD) > 0
    letters_before = jnp.cumsum(letter) - letter
    letters, total = compact(letter, lower, len(points))

    # words
    before, before2 = _shift(kind, 1), _shift(kind, 2)
    bridged = ((before & APOSTROPHE) > 0) & ((before2 & WORD) > 0)
    last = jnp.where(bridged, before2, before)
    joined = ((last & WORD) > 0) & ((last & ALONE) == 0) & ((kind & ALONE) == 0)
    first = letter & ~joined
    word_start, words = compact(first, places, limits.words)
    begin, _ = compact(first, letters_before.astype(jnp.int32), limits.words + 1)
    begin = jnp.where(jnp.arange(limits.words + 1) < words, begin, total)
    real = jnp.arange(limits.words) < words
    stems = jnp.where(real, _meaning(table, letters, begin[:-1], begin[1:]), 0)
    weights = jnp.where(real, weight_of(table, stems), 0)

    # quoted lines
    found, found_end, marks = _pair(kind, places, inside, length, 2 * limits.quotes)
    cut = marks > 2 * limits.quotes
    is_quote = found_end > found
    delta = jnp.zeros(len(points) + 1, jnp.int32)
    delta = delta.at[jnp.where(is_quote, found, len(points))].add(1)
    delta = delta.at[jnp.where(is_quote, found_end, len(points))].add(-1)
    quoted = jnp.cumsum(delta[:-1]) > 0
    count_before = jnp.append(letters_before, total).astype(jnp.int32)
    line_begin, line_end = count_before[found], count_before[found_end]
    is_quote &= line_end > line_begin  # a line that is empty when normalised is none
    sentence = _sentences(kind, quoted)
    speakers, speaker_weights, is_written = _speakers(
        table, (stems, weights, word_start, real), quoted, sentence, (found, found_end, is_quote)
    )
    is_quote &= ~is_written
    order, quotes = compact(is_quote, jnp.arange(len(found), dtype=jnp.int32), limits.quotes)
    real_quote = jnp.arange(limits.quotes) < quotes

    def keep(values: Array) -> Array:
        kept = values[order]
        return jnp.where(real_quote.reshape(-1, *[1] * (kept.ndim - 1)), kept, 0)

    line_length = keep(line_end - line_begin)
    columns = jnp.arange(limits.line)
    at = keep(line_begin)[:, None] + columns[None]
    lines = jnp.where(columns[None] < line_length[:, None], letters[jnp.minimum(at, len(points) - 1)], 0)
    return Caption(
        points,
        jnp.minimum(length, len(points)).astype(jnp.int32),
        letters,
        stems,
        weights,
        word_start,
        jnp.minimum(words, limits.words),
        _negated(table, stems, quoted[word_start]),
        keep(found),
        keep(found_end),
        jnp.minimum(quotes, limits.quotes),
        lines,
        jnp.minimum(line_length, limits.line),
        keep(speakers),
        keep(speaker_weights),
        (length > len(points))
        | (words > limits.words)
        | cut
        | (quotes > limits.quotes)
        | jnp.any(line_length > limits.line),
    )


def _shift(values: Array, by: int) -> Array:
    """Each place sees the value `by` places before it (after it where negative); beyond the text lies a space."""
    edge = jnp.full(abs(by), SPACE, values.dtype)
    return jnp.concatenate([edge, values[:-by]]) if by > 0 else jnp.concatenate([values[-by:], edge])


def contains(ordered: Int[Array, "n"], values: Array) -> Array:
    """Which values are in a sorted array."""
    at = jnp.minimum(jnp.searchsorted(ordered, values), len(ordered) - 1)
    return ordered[at] == values


def weight_of(table: Table, stems: Array) -> Array:
    """How much stems say."""
    at = jnp.minimum(jnp.searchsorted(table.known, stems), len(table.known) - 1)
    return jnp.where(table.known[at] == stems, table.weight[at], table.unknown)


def _meaning(table: Table, letters: Array, begin: Array, end: Array) -> Array:
    """As `meaning`, of the words at letters[begin:end]."""
    n = len(letters)
    powers = np.cumprod(np.r_[1, np.full(n - 1, BASE)].astype(np.uint32), dtype=np.uint32)
    inverse = np.cumprod(np.r_[1, np.full(n - 1, pow(BASE, -1, 1 << 32))].astype(np.uint32), dtype=np.uint32)
    mixed = (letters.astype(jnp.uint32) + 1) * np.uint32(SPREAD)
    sums = jnp.cumsum((mixed ^ (mixed >> 15)) * powers, dtype=jnp.uint32)
    sums = jnp.concatenate([jnp.zeros(1, jnp.uint32), sums])

    length = end - begin

    def ends_with(ending: str, least: int) -> Array:
        fits = length >= least
        for k, letter in enumerate(reversed(ending), start=1):
            fits &= letters[jnp.clip(begin + length - k, 0, n - 1)] == ord(letter)
        return fits

    def last(k: int) -> Array:
        return letters[jnp.clip(begin + length - k, 0, n - 1)]

    def one_of(value: Array, several: str) -> Array:
        return (value[..., None] == np.array([[ord(one) for one in several]])).any(-1)

    length = length - (ends_with("s", 4) & ~one_of(last(2), "sui"))
    ing = ends_with("ing", 6)
    ed = ends_with("ed", 5)
    length = length - jnp.where(ing, 3, jnp.where(ed, 2, 0))
    doubled = (ing | ed) & (last(1) == last(2)) & ~one_of(last(1), "lsz")
    length = length - jnp.where(doubled, 1, jnp.where(~doubled & ends_with("ly", 6), 2, 0))
    length = length - ends_with("e", 4)
    length = length - (ends_with("y", 4) | ends_with("i", 4))
    begin = jnp.clip(begin, 0, n - 1)
    hashed = (sums[jnp.clip(begin + length, 0, n)] - sums[begin]) * jnp.asarray(inverse)[begin]
    hashed = jnp.where(hashed == 0, 1, hashed)
    at = jnp.minimum(jnp.searchsorted(table.forms, hashed), len(table.forms) - 1)
    return jnp.where(table.forms[at] == hashed, table.becomes[at], hashed)


def _pair(kind: Array, places: Array, inside: Array, length: Array, most: int) -> tuple[Array, Array, Array]:
    """Quotation marks to quoted spans: (start, end, number of marks), start = end where there is none.

    A mark opens a quote where none is open and closes it where one is, and a quote that nobody closes ends with its
    line. Beyond that: the corner brackets of Chinese close each other only; a straight mark after a digit is an inch
    mark, unless a word follows; a right mark that stands like a closing one does not open; what opens with a left mark
    is closed by a right one if one comes before the next left one, so that other marks may stand inside.
    """
    size = most + 1
    mark = kind >> MARK
    at, marks = compact(mark > 0, places, size)
    here = jnp.arange(size) < jnp.minimum(marks, most)
    type_ = jnp.where(here, mark[at], 0)
    before, after = _shift(kind, 1)[at], _shift(kind, -1)[at]
    line = jnp.cumsum((kind & NEWLINE) > 0)
    line_end = jnp.searchsorted(line, line[at] + 1).astype(jnp.int32)  # the line break itself
    line_end = jnp.minimum(line_end, jnp.minimum(length, len(kind)).astype(jnp.int32))

    # Whether, later in the line, a right mark comes before a left one, and whether a straight one comes at all.
    def look(later: tuple, one: tuple) -> tuple:
        of_line, right, straight = later
        own, number = one
        right &= own == of_line
        straight &= own == of_line
        curly = (number == LEFT) | (number == RIGHT)
        seen = (own, jnp.where(curly, number == RIGHT, right), straight | (number == STRAIGHT))
        return seen, (right, straight)

    lines = jnp.where(here, line[at], -1)
    _, (right_next, straight_next) = jax.lax.scan(
        look, (jnp.int32(-2), False, False), (lines.astype(jnp.int32), type_), reverse=True
    )
    inch = (type_ == STRAIGHT) & ((before & DIGIT) > 0) & ((after & WORD) == 0)
    closing = (type_ == RIGHT) & ((before & SPACE) == 0) & ((after & WORD) == 0)
    opens = here & ((type_ == STRAIGHT) & ~inch | (type_ == LEFT) | (type_ == RIGHT) & ~closing)
    opens |= (type_ == CORNER) | (type_ == WHITE)
    stands_left = ((before & SPACE) > 0) & ((after & WORD) > 0)
    nests = (type_ == LEFT) & stands_left & right_next & straight_next

    def step(state: tuple, one: tuple) -> tuple:
        start, stop, opener, nested = state  # of the open quote; opener 0: none
        place, stop_here, number, may_open, right_later, nesting = one
        over = (opener > 0) & (stop != stop_here)  # its line has ended: it ended there
        emitted = (jnp.where(over, start, 0), jnp.where(over, stop, 0))
        opener, nested = jnp.where(over, 0, opener), nested & ~over
        plain = (number >= STRAIGHT) & (number <= RIGHT)
        enters = (opener == STRAIGHT) & nesting & ~nested
        closes = jnp.select(
            [opener == CORNER, opener == WHITE, opener == LEFT, opener == STRAIGHT],
            [
                number == CORNER_END,
                number == WHITE_END,
                (number == RIGHT) | (plain & ~right_later),
                plain & ~enters & ~(nested & (number == RIGHT)),
            ],
            (opener == RIGHT) & plain,
        )
        leaves = nested & (number == RIGHT)
        emitted = jax.tree.map(lambda a, b: jnp.where(closes, b, a), emitted, (start, place))
        opening = (opener == 0) & may_open
        state = (
            jnp.where(opening, place + 1, start),
            jnp.where(opening, stop_here, stop),
            jnp.where(opening, number, jnp.where(closes, 0, opener)),
            (nested | enters) & ~leaves & ~closes,
        )
        return state, emitted

    start = (jnp.int32(0), jnp.int32(0), jnp.int32(0), jnp.array(False))
    # Places past the last mark have kind 0 and the end of no line, which ends what is open.
    stops = jnp.where(here, line_end, -1)
    _, (found, found_end) = jax.lax.scan(step, start, (at, stops, type_, opens, right_next, nests))
    return found, found_end, marks


def _sentences(kind: Array, quoted: Array) -> Array:
    """The number of the sentence that each place is in.

    One begins at a line break; at a space after . ! ? … (and what closes behind it) unless a lower-case letter
    follows; and right after the full stops of Chinese. Never inside a quote.
    """

    def after_stop(bit: int) -> Array:
        ended, open_ = jnp.zeros(len(kind), bool), jnp.ones(len(kind), bool)
        for k in (1, 2, 3):
            one = _shift(kind, k)
            ended |= open_ & ((one & bit) > 0)
            open_ &= (one & CLOSER) > 0
        return ended

    next_, next2 = _shift(kind, -1), _shift(kind, -2)
    follows = jnp.where((next_ & SPACE) > 0, next2, next_)
    latin = ((kind & SPACE) > 0) & after_stop(STOP) & ((follows & LOWER) == 0)
    chinese = after_stop(STOP_CJK) & ((kind & CLOSER) == 0)
    begins = ((kind & NEWLINE) > 0) | ((latin | chinese) & ~quoted)
    return jnp.cumsum(begins)


def _speakers(table: Table, words: tuple, quoted: Array, sentence: Array, spans: tuple) -> tuple[Array, Array, Array]:
    """The speaker phrase of each quote: stems and weights, and whether the quote is on-screen text.

    The phrase is the words of the quote's sentence outside of quotes: up to 24 before it, back to the quote before,
    and up to 8 after it, unless another quote follows in the sentence and so owns them. Where these say nothing, up
    to 12 words of the sentence before. Words that only say that something is spoken or written weigh nothing.
    """
    stems, weights, word_start, real = words
    start, end, is_quote = spans
    n, size = len(quoted), len(stems)
    here = real & ~quoted[word_start]
    order, outside = compact(here, jnp.arange(size, dtype=jnp.int32), size)
    place = jnp.where(jnp.arange(size) < outside, word_start[order], n)
    place_sentence = sentence[jnp.minimum(place, n - 1)]
    starts = jnp.sort(jnp.where(is_quote, start, n))
    opened = jnp.searchsorted(starts, place)  # how many quotes begin before each word
    before = jnp.searchsorted(place, start)  # words outside of quotes before each quote
    quote = jnp.searchsorted(starts, start)
    own = sentence[jnp.clip(start - 1, 0, n - 1)]
    then = sentence[jnp.clip(end, 0, n - 1)]
    following = jnp.append(starts, n)[quote + 1]
    owned = (following < n) & (sentence[jnp.clip(following - 1, 0, n - 1)] == then)

    def pick(at: Array, wanted: Array) -> tuple[Array, Array]:
        fits = (at >= 0) & (at < outside) & wanted
        word = order[jnp.clip(at, 0, size - 1)]
        return jnp.where(fits, stems[word], 0), jnp.where(fits, weights[word], 0.0)

    def at_word(values: Array, at: Array) -> Array:
        return values[jnp.clip(at, 0, size - 1)]

    back = before[:, None] - 1 - jnp.arange(BEFORE)[None]
    in_front = (at_word(place_sentence, back) == own[:, None]) & (at_word(opened, back) == quote[:, None])
    ahead = before[:, None] + jnp.arange(AFTER)[None]
    behind = (at_word(place_sentence, ahead) == then[:, None]) & (at_word(opened, ahead) == quote[:, None] + 1)
    behind &= ~owned[:, None]
    first, first_weight = pick(back, in_front)
    second, second_weight = pick(ahead, behind)

    def says_who(phrase: Array, weight: Array) -> Array:
        return jnp.where(contains(table.spoken, phrase) | contains(table.written, phrase), 0.0, weight)

    near = jnp.sum(says_who(first, first_weight), -1) + jnp.sum(says_who(second, second_weight), -1)
    skipped = jnp.sum(at_word(place_sentence, back) == own[:, None], -1)
    far = before[:, None] - 1 - skipped[:, None] - jnp.arange(BEFORE)[None]
    there = at_word(place_sentence, before - 1 - skipped)[:, None]
    third, third_weight = pick(far, at_word(place_sentence, far) == there)
    bare = (near <= 0)[:, None]
    phrase = jnp.concatenate([jnp.where(bare, third, first), second], -1)
    weight = jnp.concatenate([jnp.where(bare, third_weight, first_weight), second_weight], -1)
    repeats = jnp.tril(phrase[:, :, None] == phrase[:, None, :], -1).any(-1)
    weight = jnp.where(repeats, 0.0, weight)
    nearby = jnp.concatenate([first, second], -1)
    is_written = contains(table.written, nearby).any(-1) & ~contains(table.spoken, nearby).any(-1)
    return phrase, says_who(phrase, weight), is_written  # a word that stands twice weighs once


def _negated(table: Table, stems: Array, quoted: Array) -> Array:
    """Words with a negation among the three before them, both outside of quotes."""
    negation = contains(table.negating, stems) & ~quoted
    near = jnp.zeros(len(stems), bool)
    for k in (1, 2, 3):
        near |= jnp.concatenate([jnp.zeros(k, bool), negation[:-k]])
    return near & ~quoted

"""Classify quotes as speech or on-screen text, and join the parts of a line, by the words around the quotes.

    N  code points of a caption      W  words of a caption      R  quotes, including on-screen text

`tests/rewards/reading.py` implements the same rules in plain Python.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.rewards.arrays import compact, count_before, last_index, next_index
from avocado_jax.rewards.quotes import DOUBLE, SCRIPT, SINGLE, STOPS, Characters, Quotes
from avocado_jax.rewards.vocabulary import ALONE, BIT, END, LEAD, LOWER, MARK, NEWLINE, SPACE, WORD
from avocado_jax.typing import Array, Bool, Float, Int

BEFORE, AFTER = 24, 8  # words considered before and after a quote
PHRASE = BEFORE + AFTER
BETWEEN = 6  # maximum words between two parts of a line
FEW = 3  # maximum words of a name or label


class Words(NamedTuple):
    """The words of a text, in order.

    Attributes:
        start: the position of each word's first character.
        stems, weights, classes: stem hashes, weights and class bits (see `vocabulary`).
        pronoun: whether the word is a pronoun.
        real: False for padding.
    """

    start: Int[Array, "W"]
    stems: Int[Array, "W"]
    weights: Float[Array, "W"]
    classes: Int[Array, "W"]
    pronoun: Bool[Array, "W"]
    real: Bool[Array, "W"]


class Around(NamedTuple):
    """The words around each quote, as indices of words outside quotes with validity masks, nearest first.

    Attributes:
        outside: the words outside quotes; `start` is N for padding.
        sentence: the sentence number of each word.
        count: number of words outside quotes before each quote.
        front, in_front: words before a quote, in its sentence, back to the previous quote.
        behind, is_behind: words after a quote; none if another quote follows in the sentence.
    """

    outside: Words
    sentence: Int[Array, "W"]
    count: Int[Array, "R"]
    front: Int[Array, "R 24"]
    in_front: Bool[Array, "R 24"]
    behind: Int[Array, "R 8"]
    is_behind: Bool[Array, "R 8"]


def has_class(classes: Int[Array, "..."], *names: str) -> Bool[Array, "..."]:
    """Whether words belong to one of the classes."""
    return (classes & sum(BIT[name] for name in names)) > 0


def words_around(
    text: Characters, words: Words, quoted: Bool[Array, "N"], sentence: Int[Array, "N"], quotes: Quotes
) -> Around:
    """Find the words around each quote."""
    n, size, most = len(quoted), len(words.start), len(quotes.start)
    order, outside = compact(words.real & ~quoted[words.start], jnp.arange(size, dtype=jnp.int32), size)
    real = jnp.arange(size) < outside
    words = jax.tree.map(lambda leaf: jnp.where(real, leaf[order], 0).astype(leaf.dtype), words)
    words = words._replace(start=jnp.where(real, words.start, n))
    of_word = jnp.where(real, sentence[jnp.minimum(words.start, n - 1)], -1)
    exists = quotes.kind > 0
    starts = jnp.where(exists, quotes.start, n)
    opened = jnp.searchsorted(starts, words.start)  # number of quotes that begin before each word
    count = jnp.searchsorted(words.start, starts)
    number = jnp.arange(most)
    sentence_before = sentence[jnp.clip(starts - 1, 0, n - 1)]
    sentence_after = sentence[jnp.clip(quotes.end, 0, n - 1)]
    following = jnp.append(starts, n)[1:]
    next_quote_follows = (following < n) & (sentence[jnp.clip(following - 1, 0, n - 1)] == sentence_after)

    front = count[:, None] - 1 - jnp.arange(BEFORE)[None]
    at = jnp.clip(front, 0, size - 1)
    in_front = (front >= 0) & (of_word[at] == sentence_before[:, None]) & (opened[at] == number[:, None])
    behind = count[:, None] + jnp.arange(AFTER)[None]
    at = jnp.clip(behind, 0, size - 1)
    is_behind = (behind < outside) & (of_word[at] == sentence_after[:, None]) & (opened[at] == number[:, None] + 1)
    is_behind &= ~next_quote_follows[:, None]
    return Around(
        words,
        of_word,
        count,
        jnp.clip(front, 0, size - 1),
        in_front & exists[:, None],
        at,
        is_behind & exists[:, None],
    )


def find_lines(
    text: Characters, quotes: Quotes, near: Around, sentence: Int[Array, "N"], inside_words: Int[Array, "R"]
) -> tuple[Bool[Array, "R"], Bool[Array, "R"]]:
    """Find which quotes are spoken, and which of these continue the line of the previous quote.

    A quote is on-screen text if it is attributed to a noun of class WRITTEN, and speech if it is attributed to a
    speaker. Without attribution it is speech, unless it is part of the surrounding sentence, like a label or a name.
    Quotes in single marks are speech only if they are attributed to a speaker, or if the caption has more speech in
    single than in double marks.

    Args:
        inside_words: the number of words in each quote.
    """
    kind, n = text.kind, len(text.kind)
    front, behind = (
        jnp.where(valid, near.outside.classes[at], 0)
        for at, valid in ((near.front, near.in_front), (near.behind, near.is_behind))
    )

    def nearest(mask: Array) -> Array:
        return jnp.where(mask.any(-1), jnp.argmax(mask, -1), BEFORE)

    def at(values: Array, index: Array) -> Array:
        picked = jnp.take_along_axis(values, jnp.clip(index, 0, values.shape[1] - 1)[:, None], 1)[:, 0]
        return jnp.where(index < values.shape[1], picked, 0)

    # The characters before the opening mark, after the closing mark, and the last one inside.
    thing = last_index((kind & (WORD | SPACE | LEAD | STOPS)) > 0)
    solid = last_index(((kind & SPACE) == 0) | ((kind & NEWLINE) > 0))
    preceding = thing[jnp.maximum(quotes.start - 1, 0)]
    preceding = jnp.where(preceding >= 0, solid[jnp.maximum(preceding, 0)], -1)
    ahead = jnp.where(preceding >= 0, kind[jnp.maximum(preceding, 0)], NEWLINE)
    glued = ((ahead & WORD) > 0) & ((ahead & ALONE) == 0)
    points = text.points
    plain = (points == ord(" ")) | (points == ord("`")) | (points == ord("*"))
    last = last_index(~plain)[jnp.maximum(quotes.end - 1, 0)]
    last_kind = jnp.where(last >= quotes.start, kind[jnp.maximum(last, 0)], 0)
    ended, few = (last_kind & END) > 0, inside_words <= FEW
    closing = (points == ord("`")) | (points == ord("*")) | (points == ord("'")) | (points == ord("’"))
    closing |= ((kind >> MARK) >= 1) & ((kind >> MARK) <= 3)
    blank = ((kind & SPACE) > 0) & ((kind & NEWLINE) == 0)
    after = next_index(~closing)[jnp.minimum(quotes.end, n - 1)]
    after = jnp.where(after < n, next_index(~blank)[jnp.minimum(after, n - 1)], n)
    small = (after < n) & ((kind[jnp.minimum(after, n - 1)] & LOWER) > 0) & (quotes.end < n)

    # The words before the quote; smaller indices are nearer.
    speaks = nearest(has_class(front, "SPOKEN"))
    written = nearest(has_class(front, "WRITTEN"))
    rank = jnp.arange(BEFORE)[None]
    reader = (at(front, written) & BIT["READ"] > 0) & (at(front, written + 1) & BIT["PERSON"] > 0)
    speaks = jnp.where(reader, jnp.minimum(speaks, written), speaks)
    written = jnp.where(reader, nearest(has_class(front, "WRITTEN") & (rank > written[:, None])), written)
    with_sound = (at(front, written + 1) & BIT["AND"] > 0) & (at(front, written + 2) & BIT["SPOKEN"] > 0)
    written = jnp.where(with_sound, BEFORE, written)
    subtitle = nearest(has_class(front, "SUBTITLE"))
    written = jnp.where((speaks == BEFORE) & (subtitle < written), subtitle, written)
    between = (rank > speaks[:, None]) & (rank < written[:, None])
    # With a person between the two verbs, the written text is not the subject of the spoken verb.
    speaker_between = (has_class(front, "PERSON", "SOURCE", "CONJUNCTION") & between).any(-1)
    content = nearest(near.in_front & ~has_class(front, "FUNCTION"))
    adjacent = glued & (at(front, content) & BIT["SPOKEN"] > 0)
    says = glued & (at(front, content) & BIT["SAYS"] > 0)

    aloud = has_class(front, "ALOUD").any(-1)
    naming = glued & near.in_front[:, 0] & has_class(front[:, 0], "NAMING")
    by_text, by_speech = written < BEFORE, speaks < BEFORE
    known = aloud | naming | by_text | by_speech
    verdict = jnp.select(
        [aloud, naming, by_text],
        [True, False, (speaks < written) & speaker_between],
        adjacent | ~glued | (ended & ~few),
    )
    strong = known & verdict
    attributing = has_class(behind, "SPOKEN", "WRITTEN")
    first_behind = jnp.take_along_axis(behind, jnp.argmax(attributing, -1)[:, None], 1)[:, 0]
    otherwise = jnp.where(attributing.any(-1) & ~glued, has_class(first_behind, "SPOKEN"), ~(glued | (small & ~ended)))
    verdict = jnp.where(known, verdict, otherwise)
    attributed = (says & (ended | (points[jnp.minimum(quotes.end, n - 1)] == ord("*")))) | (
        (ahead & (LEAD | STOPS | NEWLINE)) > 0
    )
    single = quotes.kind == SINGLE
    loose = verdict & (~single | attributed)
    full = ((last_kind & STOPS) > 0) & ~few
    verdict = loose & (~single | strong | full)

    # A quote in brackets without a word of speech is a translation.
    opened, closed = last_index(points == ord("(")), last_index(points == ord(")"))
    front_index = jnp.maximum(quotes.start - 1, 0)
    bracket = opened[front_index]
    in_brackets = (bracket > closed[front_index]) & (bracket > last_index((kind & NEWLINE) > 0)[front_index])
    sounds = count_before(has_class(near.outside.classes, "SPOKEN"))
    since = jnp.searchsorted(near.outside.start, bracket)
    in_brackets &= sounds[near.count] == sounds[since]
    # If only function words separate two quotes, the second has the class of the first.
    previous = jnp.concatenate([jnp.zeros(1, jnp.int32), quotes.end[:-1]])
    plain_word = has_class(near.outside.classes, "FUNCTION") & (
        ~has_class(near.outside.classes, "CONJUNCTION") | has_class(near.outside.classes, "AND")
    )
    content_words = count_before(near.outside.start < n) - count_before(plain_word & (near.outside.start < n))
    since = jnp.searchsorted(near.outside.start, previous)
    same_sentence = sentence[jnp.clip(previous, 0, n - 1)] == sentence[front_index]
    inherits = (
        (jnp.arange(len(previous)) > 0)
        & same_sentence
        & ~known
        & ~in_brackets
        & (content_words[near.count] == content_words[since])
    )
    script = quotes.kind == SCRIPT
    verdict, loose = ((value & ~in_brackets) | script for value in (verdict, loose))
    inherits &= ~script
    before = jnp.concatenate([jnp.zeros(1, quotes.kind.dtype), quotes.kind[:-1]])
    may = (quotes.kind == before) | (quotes.kind == DOUBLE)

    def carry(earlier: Array, item: tuple) -> tuple:
        current, takes, fits = item
        current = jnp.where(takes, earlier & fits, current)
        return current, current

    _, spoken = jax.lax.scan(carry, jnp.array(False), (verdict, inherits, may))
    exists = quotes.kind > 0
    more_single = jnp.sum(spoken & single & exists) > jnp.sum(spoken & ~single & exists)
    spoken = jnp.where(more_single, jnp.where(inherits, spoken, loose), spoken) & exists

    # "Open it," she says, "before they come back."
    comma = last_kind_is_comma(text, last, quotes)
    first = next_index(~plain)[jnp.minimum(quotes.start, n - 1)]
    begins_small = (first < quotes.end) & ((kind[jnp.minimum(first, n - 1)] & LOWER) > 0)
    counts = [
        count_before(mask & (near.outside.start < n))
        for mask in (
            near.outside.start < n,
            has_class(near.outside.classes, "SPOKEN"),
            has_class(near.outside.classes, "CONJUNCTION"),
        )
    ]
    words_between, spoken_between, conjunctions_between = (count[near.count] - count[since] for count in counts)
    double = quotes.kind == DOUBLE
    earlier = [jnp.concatenate([jnp.zeros(1, value.dtype), value[:-1]]) for value in (spoken, double, comma)]
    goes_on = spoken & earlier[0] & double & earlier[1] & earlier[2] & begins_small & same_sentence
    goes_on &= (words_between > 0) & (words_between <= BETWEEN) & (spoken_between > 0) & (conjunctions_between == 0)
    return spoken, goes_on


def last_kind_is_comma(text: Characters, last: Array, quotes: Quotes) -> Array:
    """Whether the last character of each quote is a comma."""
    point = text.points[jnp.maximum(last, 0)]
    return (last >= quotes.start) & ((point == ord(",")) | (point == ord("，")))

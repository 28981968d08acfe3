"""Find quotes: quotation marks of all kinds, and direct speech without marks.

    N  code points of a caption      M  quotation marks of a caption      R  quotes

The characters on both sides of a double mark decide whether it opens or closes; an ambiguous mark opens if no quote is
open. An unclosed quote ends with its sentence if another quote opens in its line, and with its line otherwise. Single
marks, straight or curly, and `*` are quotation marks only outside double marks. Chinese brackets match only each other.
"Speaker: text" at the start of a line, and "she says: text", are direct speech. `tests/rewards/reading.py` implements
the same rules in plain Python.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from avocado_jax.rewards.arrays import compact, count_before, last_index, next_index, shift
from avocado_jax.rewards.vocabulary import (
    APOSTROPHE_MARK,
    BIT,
    CLOSER,
    CORNER,
    CORNER_END,
    DIGIT,
    END,
    LEAD,
    LEFT,
    LOWER,
    MARK,
    NEWLINE,
    RIGHT,
    SINGLE_LEFT,
    SPACE,
    STAR,
    STOP,
    STOP_CJK,
    STRAIGHT,
    TAIL,
    UPPER,
    WHITE,
    WHITE_END,
    WORD,
)
from avocado_jax.typing import Array, Bool, Int

OPENS, CLOSES, EITHER, SINGLE_OPENS, SINGLE_CLOSES, OPENS_CORNER, CLOSES_CORNER, OPENS_WHITE, CLOSES_WHITE = range(
    1, 10
)
DOUBLE, SINGLE, IN_CORNERS, IN_WHITE, SCRIPT = range(1, 6)  # kinds of quotes
STOPS = STOP | STOP_CJK
HEAD = 4  # maximum words of a speaker's name before a colon


class Characters(NamedTuple):
    """Properties of each position of a text.

    Attributes:
        points, kind: code points and their kinds (bits of `vocabulary`).
        line, paragraph: line and paragraph numbers; a line break belongs to the next line.
        line_end: position of the line break that ends the line, or the end of the text.
    """

    points: Int[Array, "N"]
    kind: Int[Array, "N"]
    line: Int[Array, "N"]
    paragraph: Int[Array, "N"]
    line_end: Int[Array, "N"]


class Quotes(NamedTuple):
    """At most R quotes in order: start and end without marks, and kind (0: none).

    Attributes:
        truncated: whether the text has more marks or quotes than the limits.
    """

    start: Int[Array, "R"]
    end: Int[Array, "R"]
    kind: Int[Array, "R"]
    truncated: Bool[Array, ""]


def characters(points: Int[Array, "N"], kind: Int[Array, "N"], length: Int[Array, ""]) -> Characters:
    """Lines and paragraphs of a text of `length` code points."""
    newline = (kind & NEWLINE) > 0
    crlf = (points == ord("\n")) & (shift(points, 1, 0) == ord("\r"))
    line = jnp.cumsum(newline, dtype=jnp.int32)
    paragraph = jnp.cumsum(newline & ((shift(kind, 1, 0) & NEWLINE) > 0) & ~crlf, dtype=jnp.int32)
    stop = jnp.minimum(length, len(points)).astype(jnp.int32)
    line_end = jnp.minimum(shift(next_index(newline), -1, len(points)), stop)
    return Characters(points, kind, line, paragraph, line_end)


def find_quotes(text: Characters, words: tuple, most_marks: int, most: int) -> Quotes:
    """Find the quotes of a text.

    Args:
        words: start of each word, its classes, and False for padding, [W] each.
        most_marks, most: maximum number of marks and of quotes.
    """
    code, width, fenced = _marks(text)
    marked = _pair(text, code, width, most_marks)
    word_character_count = count_before((text.kind & WORD) > 0)
    start, end, kind = marked[:3]
    kind = jnp.where(word_character_count[end] > word_character_count[start], kind, 0)  # drop quotes without words
    double = (code > 0) & (code != SINGLE_OPENS) & (code != SINGLE_CLOSES)
    double &= (code != CLOSES_CORNER) & (code != CLOSES_WHITE)
    scripts, more = _scripts(
        text, words, quote_mask(start, end, kind, len(code)), fenced, double, word_character_count, most
    )
    start, end, kind = (jnp.concatenate(pair) for pair in zip((start, end, kind), scripts))
    order = jnp.argsort(jnp.where(kind > 0, start, len(code)))[:most]
    found = jnp.sum(kind > 0)
    start, end, kind = start[order], end[order], kind[order]
    real = kind > 0
    truncated = (jnp.sum(code > 0) > most_marks) | (found > most) | more
    return Quotes(jnp.where(real, start, 0), jnp.where(real, end, 0), kind, truncated)


def quote_mask(start: Array, end: Array, kind: Array, size: int) -> Bool[Array, "N"]:
    """Mask of the positions inside quotes."""
    delta = jnp.zeros(size + 1, jnp.int32)
    delta = delta.at[jnp.where(kind > 0, start, size)].add(1)
    delta = delta.at[jnp.where(kind > 0, end, size)].add(-1)
    return jnp.cumsum(delta[:-1]) > 0


def _marks(text: Characters) -> tuple[Array, Array, Array]:
    """The code of the mark that begins at each position (0: none), its width, and whether it is in a code block.

    Two apostrophes and &quot; are double marks.
    """
    points, kind = text.points, text.kind
    mark = kind >> MARK
    before = shift(kind, 1, SPACE)
    apostrophe = points == ord("'")
    tick = points == ord("`")
    ticks = [shift(tick, k, False) for k in (1, 2, 3, 4)]
    fenced = jnp.cumsum(ticks[0] & ticks[1] & ticks[2] & ~ticks[3]) % 2 == 1
    entity = points == ord("&")
    for k, letter in enumerate("quot;", start=1):
        entity &= shift(points, -k, 0) == ord(letter)
    twice = apostrophe & shift(apostrophe, -1, False)
    width = jnp.where(entity, 6, jnp.where(twice, 2, 1)).astype(jnp.int32)
    after = jnp.where(entity, shift(kind, -6, SPACE), jnp.where(twice, shift(kind, -2, SPACE), shift(kind, -1, SPACE)))

    space_before, space_after = (before & SPACE) > 0, (after & SPACE) > 0
    led = space_before | ((before & LEAD) > 0)
    tailed = space_after | ((after & TAIL) > 0)
    opens, closes = led & ~tailed, ~space_before & tailed
    single = (mark == APOSTROPHE_MARK) & ~twice | (mark == SINGLE_LEFT)
    single |= (mark == STAR) & (before >> MARK != STAR) & (after >> MARK != STAR)
    big_after = (after & UPPER) > 0
    enters = (mark == SINGLE_LEFT) | opens | (((before & LOWER) > 0) & big_after)
    leaves = ~space_before & (tailed | (((before & STOPS) > 0) & big_after))
    straight = jnp.where(opens, OPENS, jnp.where(closes & ~(led & space_after), CLOSES, EITHER))
    code = jnp.select(
        [
            (mark == STRAIGHT) | twice | entity,
            mark == LEFT,
            mark == RIGHT,
            single & enters,
            single & leaves,
            mark == CORNER,
            mark == CORNER_END,
            mark == WHITE,
            mark == WHITE_END,
        ],
        [
            straight,
            jnp.where(closes & ~led, CLOSES, OPENS),
            jnp.where(opens, OPENS, CLOSES),
            *(jnp.full_like(straight, value) for value in range(SINGLE_OPENS, CLOSES_WHITE + 1)),
        ],
        0,
    )
    second = apostrophe & shift(apostrophe, 1, False)
    return jnp.where(fenced | second, 0, code), width, fenced


def _pair(text: Characters, code: Array, width: Array, most: int) -> tuple[Array, Array, Array]:
    """Pair marks to quotes: start, end and kind (0: none) of the quote that each mark, or the end of the text, ends."""
    size = most + 1  # entries past the last mark are in no paragraph, which closes open quotes
    n = len(code)
    at, marks = compact(code > 0, jnp.arange(n, dtype=jnp.int32), size)
    here = jnp.arange(size) < jnp.minimum(marks, most)
    code = jnp.where(here, code[at], 0)
    kind, before = text.kind, shift(text.kind, 1, SPACE)
    line, paragraph = jnp.where(here, text.line[at], -2), jnp.where(here, text.paragraph[at], -2)
    strong = (before[at] & END) > 0  # a single mark after a full stop or comma is not an apostrophe
    space_before, digit_before = (before[at] & SPACE) > 0, (before[at] & DIGIT) > 0
    solid = last_index((kind & SPACE) == 0)[jnp.maximum(at - 1, 0)]
    over = space_before & (solid >= 0) & ((kind[jnp.maximum(solid, 0)] & STOPS) > 0)  # after a sentence

    def look(later: tuple, mark: tuple) -> tuple:
        later_line, later_paragraph, first, second, closes = later
        number, of_line, of_paragraph, is_strong = mark
        first, second = (jnp.where(later_paragraph == of_paragraph, value, 0) for value in (first, second))
        closes &= later_line == of_line
        answer = (first, second, closes)
        double = (number >= OPENS) & (number <= EITHER)
        closes = jnp.where((number == SINGLE_OPENS) | (number == OPENS), False, closes)
        closes |= (number == SINGLE_CLOSES) & is_strong
        second, first = jnp.where(double, first, second), jnp.where(double, number, first)
        return (of_line, of_paragraph, first, second, closes), answer

    zero = jnp.int32(0)
    # The next two double marks of the paragraph, and whether a strong single mark closes before another opens.
    _, (next_one, next_two, closed_later) = jax.lax.scan(
        look, (zero - 2, zero - 2, zero, zero, jnp.array(False)), (code, line, paragraph, strong), reverse=True
    )

    def step(state: tuple, mark: tuple) -> tuple:
        opener, start, first, first_line, first_paragraph, nested, inner, marked = state
        index, size, number, mark_line, mark_paragraph, ahead, ahead2, later, flags = mark
        is_strong, spaced, digit, ended = flags
        left = (mark_paragraph != first_paragraph) | ((opener != DOUBLE) & (mark_line != first_line))
        left &= opener > 0
        line_over = (
            start,
            jnp.where((opener == DOUBLE) & (marked >= 0), marked, -1),
            jnp.where(opener == SINGLE, 0, opener),
        )
        opener = jnp.where(left, 0, opener)
        nested, inner, marked = nested & ~left, inner & ~left, jnp.where(left, -1, marked)

        free, double, single = opener == 0, opener == DOUBLE, opener == SINGLE
        is_opens, is_closes, is_either = number == OPENS, number == CLOSES, number == EITHER
        shuts = is_closes | is_either
        pair_inside = ((ahead == CLOSES) | (ahead == EITHER)) & ((ahead2 == CLOSES) | (ahead2 == EITHER))
        misplaced = ((ahead == OPENS) | (ahead == 0)) & ended
        enters = double & is_opens & ~nested & pair_inside
        closes = double & ((shuts & ~nested) | (is_opens & ~nested & ~pair_inside & misplaced))
        broken = double & is_opens & ~nested & ~pair_inside & ~misplaced  # it was never closed
        closes |= single & (is_closes | (is_either & ~spaced) | ((number == SINGLE_CLOSES) & (is_strong | ~later)))
        closes |= (opener == IN_CORNERS) & (number == CLOSES_CORNER) | (opener == IN_WHITE) & (number == CLOSES_WHITE)
        begins = jnp.select(
            [
                free & (is_opens | is_either & ~digit) | single & (is_opens | is_either & spaced) | broken,
                (free | single) & (number == SINGLE_OPENS),
                free & (number == OPENS_CORNER),
                free & (number == OPENS_WHITE),
            ],
            [DOUBLE, SINGLE, IN_CORNERS, IN_WHITE],
            0,
        )
        # The end of an unclosed quote: -1 for the end of its line, -2 for the end of the sentence or this mark.
        unclosed = jnp.where(marked >= 0, marked, jnp.where(mark_line == first_line, -2, -1))
        found = (start, jnp.where(broken, unclosed, index), jnp.where(closes | broken, opener, 0))
        found = jax.tree.map(lambda a, b: jnp.where(left, a, b), line_over, found)
        nested = (nested | enters) & ~(double & shuts)
        unmatched = double & (number == SINGLE_CLOSES) & ~inner & is_strong & (marked < 0)
        marked = jnp.where(unmatched, index, marked)
        inner = double & ((number == SINGLE_OPENS) | inner & (number != SINGLE_CLOSES))
        fresh = begins > 0
        state = (
            jnp.where(fresh, begins, jnp.where(closes, 0, opener)),
            jnp.where(fresh, index + size, start),
            jnp.where(fresh, index, first),
            jnp.where(fresh, mark_line, first_line),
            jnp.where(fresh, mark_paragraph, first_paragraph),
            nested & ~fresh,
            inner & ~fresh,
            jnp.where(fresh, -1, marked),
        )
        return state, (*found, first)

    false = jnp.array(False)
    state = (zero, zero, zero, zero, zero, false, false, zero - 1)
    flags = (strong, space_before, digit_before, over)
    inputs = (at, width[at], code, line, paragraph, next_one, next_two, closed_later, flags)
    _, (start, end, kind_of, first) = jax.lax.scan(step, state, inputs)
    sentence_end = next_index(((before & STOPS) > 0) & ((kind & SPACE) > 0))
    stop = jnp.minimum(sentence_end[jnp.clip(start + 1, 0, n - 1)], at)
    end = jnp.where(end == -1, text.line_end[first], jnp.where(end == -2, stop, end))
    real = (kind_of > 0) & (end > start)
    kind_of = jnp.where(kind_of == IN_WHITE, IN_CORNERS, kind_of)
    return jnp.where(real, start, 0), jnp.where(real, end, 0), jnp.where(real, kind_of, 0)


def _scripts(
    text: Characters, words: tuple, quoted: Array, fenced: Array, marks: Array, word_character_count: Array, most: int
) -> tuple[tuple, Array]:
    """Direct speech without marks: (start, end, kind) of at most `most` quotes, and whether there were more candidates.

    Only the first colon of a line is considered. After a name of at most four words whose last word has class PERSON,
    the rest of the line is speech. After a verb of class SAYS, one sentence is speech. Words in brackets and numbers
    are ignored.
    """
    points, kind, n = text.points, text.kind, len(text.points)
    word_start, classes, real = words
    wide = points == ord("：")
    spaced = ((shift(kind, -1, SPACE) & SPACE) > 0) | (shift(points, -1, 0) == ord("*"))
    colon = (wide | (points == ord(":")) & spaced) & ~fenced & ~quoted
    newline = (kind & NEWLINE) > 0
    count = count_before(colon)
    in_line = jax.lax.cummax(jnp.where(newline, count[:-1], 0))
    colon &= count[:-1] == in_line
    at, colons = compact(colon, jnp.arange(n, dtype=jnp.int32), most)
    exists = jnp.arange(most) < colons

    opened = (points == ord("(")) | (points == ord("["))
    bracket = last_index(opened | (points == ord(")")) | (points == ord("]")))
    begin = last_index(newline)  # the line begins after it
    bracketed = opened[jnp.maximum(bracket, 0)] & (bracket > begin)
    counts = real & ~bracketed[word_start] & ((kind[word_start] & DIGIT) == 0)
    cumulative, last = count_before(counts), last_index(counts)
    until = jnp.searchsorted(jnp.where(real, word_start, n), at)
    since = jnp.searchsorted(jnp.where(real, word_start, n), begin[at] + 1)
    names = cumulative[until] - cumulative[since]
    of_last = jnp.where(names > 0, classes[jnp.maximum(last[jnp.maximum(until - 1, 0)], 0)], 0)
    line = ((of_last & BIT["PERSON"]) > 0) & (names <= HEAD)
    says = ((of_last & BIT["SAYS"]) > 0) & ~line

    solid = next_index(((kind & SPACE) == 0) & (points != ord("*")))
    line_end = text.line_end[at]
    start = jnp.minimum(solid[jnp.minimum(at + 1, n - 1)], line_end)
    sentence_end = next_index(((shift(kind, 1, SPACE) & STOPS) > 0) & ((kind & SPACE) > 0))
    end = jnp.where(says, jnp.minimum(sentence_end[jnp.minimum(start + 1, n - 1)], line_end), line_end)
    marks, quoted = count_before(marks), count_before(quoted)
    fits = exists & (line | says) & (start < end) & (marks[end] == marks[jnp.minimum(at + 1, n)])
    fits &= (quoted[end] == quoted[start]) & (word_character_count[end] > word_character_count[start])
    return (jnp.where(fits, start, 0), jnp.where(fits, end, 0), jnp.where(fits, SCRIPT, 0)), colons > most


def sentences(text: Characters, quoted: Bool[Array, "N"]) -> Int[Array, "N"]:
    """The sentence number of each position.

    A sentence begins at a line break, after a Chinese full stop, and at a space after . ! ? … (and closing characters)
    unless a lower-case letter follows. No sentence begins inside a quote.
    """
    kind = text.kind

    def after_stop(bit: int) -> Array:
        ended, open_ = jnp.zeros(len(kind), bool), jnp.ones(len(kind), bool)
        for k in (1, 2, 3):
            earlier = shift(kind, k, SPACE)
            ended |= open_ & ((earlier & bit) > 0)
            open_ &= (earlier & CLOSER) > 0
        return ended

    next_, next2 = shift(kind, -1, SPACE), shift(kind, -2, SPACE)
    follows = jnp.where((next_ & SPACE) > 0, next2, next_)
    latin = ((kind & SPACE) > 0) & after_stop(STOP) & ((follows & LOWER) == 0)
    chinese = after_stop(STOP_CJK) & ((kind & CLOSER) == 0)
    return jnp.cumsum(~quoted & (((kind & NEWLINE) > 0) | latin | chinese), dtype=jnp.int32)

"""The rewards in plain Python, one character, one line, one pair at a time: what the array programs must equal."""

import re
from typing import NamedTuple

from rapidfuzz.distance import Levenshtein

from avocado_jax.rewards import vocabulary  # its lists of words and its stems
from avocado_jax.rewards.text import AFTER, BEFORE

DOUBLE = {
    '"': "straight",
    "＂": "straight",
    "“": "left",
    "„": "left",
    "‟": "left",
    "«": "left",
    "”": "right",
    "»": "right",
}
CORNERS = {"「": "」", "『": "』"}
CLOSERS = ")]}'’*`" + "".join(DOUBLE) + "「」『』"
SPOKEN = {vocabulary.meaning(word) for word in vocabulary.SPOKEN.split()}
WRITTEN = {vocabulary.meaning(word) for word in vocabulary.WRITTEN.split()}
LINE_BREAKS = "\n\r\u2028\u2029"


class Line(NamedTuple):
    """A line of dialogue as the alignment sees it."""

    text: str
    speaker: object


def normalize(text: str) -> str:
    """Word characters in lower case, code point by code point."""
    return "".join("σ" if one == "ς" else one.lower()[0] for one in re.sub(r"[^\w]", "", text)).replace("ς", "σ")


def quotes(text: str) -> list[str]:
    """Quoted lines of a text; those without a word character and on-screen text are left out."""
    spans = [span for span in _spans(text) if normalize(text[span[0] : span[1]])]
    sentences, every = _sentences(text), _spans(text)
    words = [
        (found.start(), vocabulary.meaning(word))
        for found in re.finditer(r"\w+(?:['’`]\w+)*", text)
        for word in vocabulary.words_of(found[0])
        if not any(start <= found.start() < end for start, end in every)
    ]
    spoken = []
    for number, (start, end) in enumerate(spans):
        after_last = spans[number - 1][0] if number else -1
        near = [
            word
            for place, word in words
            if after_last < place < start and sentences[place] == sentences[max(start - 1, 0)]
        ][-BEFORE:]
        then = sentences[min(end, len(text) - 1)]
        following = spans[number + 1][0] if number + 1 < len(spans) else len(text)
        if number + 1 == len(spans) or sentences[following - 1] != then:
            behind = [word for place, word in words if start < place < following and sentences[place] == then]
            near += behind[:AFTER]
        if SPOKEN & set(near) or not WRITTEN & set(near):
            spoken.append(text[start:end])
    return spoken


def _sentences(text: str) -> list[int]:
    """The number of the sentence at each place."""
    spans, number, numbers = _spans(text), 0, []
    for place, letter in enumerate(text):
        if letter in LINE_BREAKS:
            number += 1
        elif not any(start <= place < end for start, end in spans):
            back = text[max(place - 3, 0) : place]
            back = back.rstrip(CLOSERS) if back[-1:] in CLOSERS else back
            follows = text[place + 1 : place + 2] or " "
            follows = (text[place + 2 : place + 3] or " ") if follows.isspace() else follows
            latin = letter.isspace() and back[-1:] in set(".!?…") and not follows.islower()
            number += latin or (letter not in CLOSERS and back[-1:] in set("。！？"))
        numbers.append(number)
    return numbers


def _spans(text: str) -> list[tuple[int, int]]:
    """Where quotes begin and end, without their marks."""
    spans, first = [], 0
    for line in re.split(f"[{LINE_BREAKS}]", text):
        spans += [(first + start, first + end) for start, end in _quotes_of_line(line)]
        first += len(line) + 1
    return [span for span in spans if span[0] < span[1]]


def _quotes_of_line(line: str) -> list[tuple[int, int]]:
    spans, start, opener, nested = [], 0, "", False
    for place, mark in enumerate(line):
        before, after = line[place - 1 : place] or " ", line[place + 1 : place + 2] or " "
        rest = line[place + 1 :]
        if not opener:
            if mark in CORNERS:
                start, opener = place + 1, mark
            elif mark in DOUBLE:
                inch = DOUBLE[mark] == "straight" and before.isdecimal() and not is_word(after)
                closing = DOUBLE[mark] == "right" and not before.isspace() and not is_word(after)
                if not inch and not closing:
                    start, opener = place + 1, mark
            continue
        if opener in CORNERS:
            closes = mark == CORNERS[opener]
        elif mark not in DOUBLE:
            continue
        elif DOUBLE[opener] == "left":
            closes = DOUBLE[mark] == "right" or not right_comes_next(rest)
        elif DOUBLE[opener] == "straight":
            pair_inside = (
                DOUBLE[mark] == "left"
                and before.isspace()
                and is_word(after)
                and right_comes_next(rest)
                and any(DOUBLE.get(one) == "straight" for one in rest)
            )
            if nested and DOUBLE[mark] == "right":
                nested, closes = False, False
            elif pair_inside and not nested:
                nested, closes = True, False
            else:
                closes = True
        else:
            closes = True
        if closes:
            spans.append((start, place))
            opener, nested = "", False
    if opener:
        spans.append((start, len(line)))
    return spans


def right_comes_next(rest: str) -> bool:
    """Whether, of the curly marks in what is left of a line, the first is a right one."""
    curly = [DOUBLE[one] for one in rest if DOUBLE.get(one) in ("left", "right")]
    return curly[:1] == ["right"]


def is_word(letter: str) -> bool:
    """Whether `re` calls it a word character."""
    return bool(re.match(r"\w", letter))


def similarity(a: str, b: str) -> float:
    """1 - edit distance / the longer length."""
    return 1 - Levenshtein.distance(a, b) / max(len(a), len(b))


def dialogue(told: list[Line], truth: list[Line], threshold: float = 0.6) -> tuple[float, int, float]:
    """Summed similarity and agreeing speakers of the best alignment, and R_D: the equations, cell by cell."""
    told = [line for line in (Line(normalize(text), who) for text, who in told) if line.text]
    truth = [line for line in (Line(normalize(text), who) for text, who in truth) if line.text]
    if not told or not truth:
        return 0.0, 0, float(not told and not truth)
    best = [[(0.0, 0)] * (len(truth) + 1) for _ in range(len(told) + 1)]
    for i, line in enumerate(told, 1):
        for j, other in enumerate(truth, 1):
            options = [best[i - 1][j], best[i][j - 1]]
            alike = similarity(line.text, other.text)
            if alike >= threshold:
                content, speakers = best[i - 1][j - 1]
                options.append((content + alike, speakers + (line.speaker == other.speaker)))
            most = max(content for content, _ in options)
            best[i][j] = max((one for one in options if one[0] >= most - 1e-6), key=lambda one: (one[1], one[0]))
    content, speakers = best[-1][-1]
    score = (content + speakers) / 2
    recall, precision = score / len(truth), score / len(told)
    return content, speakers, 2 * recall * precision / (recall + precision) if score else 0.0


def length(tokens: int, low: int = 2048, high: int = 4096) -> float:
    """R_L."""
    if tokens < low:
        return 1.0
    return 0.0 if tokens >= high else 1 - (tokens - low) / (high - low)


def collapses(text: str, min_span: int = 24) -> bool:
    """RepCol by regular expressions: a unit of 1-49 characters five times or more, of 50-99 four times or more."""
    for unit in range(1, 100):
        times = 5 if unit < 50 else 4
        for found in re.finditer(rf"(?=((.{{{unit}}})\2{{{times - 1},}}))", text, re.DOTALL):
            stretch, piece = found[1], found[2]
            extra = 0  # the start of one more unit belongs to the stretch
            while text[found.start() + len(stretch) + extra :][:1] == piece[extra : extra + 1] != "":
                extra += 1
            if len(stretch) + extra >= min_span:
                return True
    return False

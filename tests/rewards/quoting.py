"""Reference implementation in plain Python of the begin and end of quotes."""

import re
from typing import NamedTuple

from avocado_jax.rewards.lexicon import CLASSES as LISTS
from avocado_jax.rewards.lexicon import FUNCTION as FUNCTION_WORDS
from avocado_jax.rewards.vocabulary import SCRIPTS_WITHOUT_SPACES, meaning

LINE_BREAKS = "\n\r\u2028\u2029"
LEAD = ",:;([{—–，：；（"  # what a quote may follow without a space
TAIL = ".,!?…;:)]}'’，。！？"  # what may follow a closing mark without a space
STOPS = ".!?…。！？"
ENDS = STOPS + ",，-—~"
CLOSERS = ")]}'’*`\"＂“”„‟«»「」『』"
CORNERS = {"「": "」", "『": "』"}
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
SINGLE = "'‘’*"
CLASSES = {name: {meaning(word) for word in words.split()} for name, words in LISTS.items()}
FUNCTION = {meaning(word) for word in FUNCTION_WORDS.split()}


class Mark(NamedTuple):
    index: int
    width: int
    kind: str  # opens, closes, either (double marks); single opens, single closes; a corner bracket


class Span(NamedTuple):
    start: int
    end: int
    kind: str  # double, single, corner, script


def in_bracket(before):
    brackets = re.sub(r"[^()\[\]]", "", before)
    return brackets[-1:] in ("(", "[")


def is_alone(letter):
    return any(a <= ord(letter) <= b for a, b in SCRIPTS_WITHOUT_SPACES)


def words_at(text):
    """(position, meaning) of each word; an apostrophe between a lower-case and an upper-case letter splits."""
    found = []
    for token in re.finditer(r"\w+(?:['’`]\w+)*", text):
        for index in range(*token.span()):
            letter, before = text[index], text[index - 1] if index > token.start() else ""
            if not is_word(letter):
                continue
            separate = not before or is_alone(letter) or is_alone(text[index - 1 if is_word(before) else index - 2])
            if separate or (not is_word(before) and text[index - 2].islower() and letter.isupper()):
                found.append([index, ""])
            found[-1][1] += normalize(letter)
    return [(index, meaning(word)) for index, word in found]


def is_word(letter):
    return letter.isalnum() or letter == "_"


class Text:
    def __init__(self, text):
        self.text, self.words = text, words_at(text)
        self.line, self.paragraph, self.fenced = [], [], []
        line = paragraph = fences = 0
        for index, letter in enumerate(text):
            if text[index - 3 : index] == "```" and text[index - 4 : index - 3] != "`":
                fences += 1
            if letter in LINE_BREAKS:
                line += 1
                paragraph += index > 0 and text[index - 1] in LINE_BREAKS and text[index - 1 : index + 1] != "\r\n"
            self.line.append(line)
            self.paragraph.append(paragraph)
            self.fenced.append(fences % 2 == 1)

    def at(self, index):
        return self.text[index] if 0 <= index < len(self.text) else " "

    def line_end(self, index):
        return next((p for p in range(index, len(self.text)) if self.line[p] != self.line[index]), len(self.text))


def marks(t):
    found = []
    text = t.text
    for index, letter in enumerate(text):
        if t.fenced[index]:
            continue
        before = t.at(index - 1)
        if letter == "'" and (before == "'"):
            continue
        width = 1
        if letter == "&" and text[index : index + 6] == "&quot;":
            width = 6
        elif letter == "'" and t.at(index + 1) == "'":
            width = 2
        after = t.at(index + width)
        space_before, space_after = before.isspace(), after.isspace()
        led = space_before or before in LEAD
        tailed = space_after or after in TAIL or after in DOUBLE or after in CORNERS.values()
        if letter in "「」『』":
            found.append(Mark(index, 1, letter))
        elif letter in DOUBLE or width > 1:
            opens = led and not tailed
            closes = not space_before and tailed
            direction = DOUBLE.get(letter, "straight")
            if direction == "left":
                kind = "closes" if closes and not led else "opens"
            elif direction == "right":
                kind = "opens" if opens else "closes"
            else:
                kind = "opens" if opens else "closes" if closes and not (led and space_after) else "either"
            found.append(Mark(index, width, kind))
        elif letter in SINGLE:
            if letter == "*" and "*" in (before, after):
                continue
            if letter == "‘" or (led and not tailed) or (before.islower() and after.isupper()):
                found.append(Mark(index, 1, "single opens"))
            elif not space_before and (tailed or (before in STOPS and after.isupper())):
                found.append(Mark(index, 1, "single closes"))
    return found


DOUBLES = ("opens", "closes", "either")


def spans(t):
    found = marks(t)
    out = []
    text = t.text

    def next_doubles(number):
        here = t.paragraph[found[number].index]
        later = [m.kind for m in found[number + 1 :] if m.kind in DOUBLES and t.paragraph[m.index] == here]
        return [*later, "", ""][:2]

    def strong(mark):
        return t.at(mark.index - 1) in ENDS

    def strong_later(number):
        here = t.line[found[number].index]
        for m in found[number + 1 :]:
            if t.line[m.index] != here or m.kind in ("single opens", "opens"):
                return False
            if m.kind == "single closes" and strong(m):
                return True
        return False

    opener, start, first = "", 0, 0  # first: place of the opening mark
    nested = inner = False
    marked = None  # a single mark that may close what is open

    def unclosed(limit):
        if marked is not None:
            return marked
        if limit is not None and t.line[limit] == t.line[first]:
            for index in range(start + 1, limit + 1):
                if text[index - 1] in STOPS and t.at(index).isspace():
                    return index
            return limit
        return t.line_end(first)

    def begin(what, mark):
        nonlocal opener, start, first, nested, inner, marked
        opener, start, first, nested, inner, marked = what, mark.index + mark.width, mark.index, False, False, None

    for number, mark in enumerate([*found, None]):
        index = mark.index if mark else None
        if opener and (
            mark is None
            or t.paragraph[index] != t.paragraph[first]
            or (opener in ("single", "「", "『") and t.line[index] != t.line[first])
        ):
            if opener == "double":
                out.append(Span(start, unclosed(None), "double"))
            elif opener in CORNERS:
                out.append(Span(start, t.line_end(first), "corner"))
            opener = ""
        if mark is None:
            break
        kind = mark.kind

        if not opener:
            if kind in CORNERS:
                begin(kind, mark)
            elif kind == "opens" or (kind == "either" and not t.at(index - 1).isdecimal()):
                begin("double", mark)
            elif kind == "single opens":
                begin("single", mark)
        elif opener in CORNERS:
            if kind == CORNERS[opener]:
                out.append(Span(start, index, "corner"))
                opener = ""
        elif opener == "single":
            if (
                kind == "closes"
                or (kind == "either" and not t.at(index - 1).isspace())
                or (kind == "single closes" and (strong(mark) or not strong_later(number)))
            ):
                out.append(Span(start, index, "single"))
                opener = ""
            elif kind in ("opens", "either"):
                begin("double", mark)
            elif kind == "single opens":
                begin("single", mark)
        else:
            if kind in ("closes", "either"):
                if nested:
                    nested = False
                else:
                    out.append(Span(start, index, "double"))
                    opener = ""
            elif kind == "opens":
                one, two = next_doubles(number)
                if nested:
                    pass
                elif one in ("closes", "either") and two in ("closes", "either"):
                    nested = True
                elif one in ("opens", "") and t.at(index - 1).isspace() and text[:index].rstrip()[-1:] in tuple(STOPS):
                    out.append(Span(start, index, "double"))
                    opener = ""
                else:
                    out.append(Span(start, unclosed(index), "double"))
                    begin("double", mark)
            elif kind == "single opens":
                inner = True
            elif kind == "single closes":
                if inner:
                    inner = False
                elif strong(mark) and marked is None:
                    marked = index
    out = [s for s in out if any(map(is_word, text[s.start : s.end]))]
    return sorted(out + scripts(t, out, found))


def scripts(t, quoted, found):
    """Lines of a script, and direct speech after a verb and a colon, without marks."""
    out = []
    text = t.text
    done = set()
    for index, letter in enumerate(text):
        if letter not in ":：" or not (letter == "：" or t.at(index + 1).isspace() or t.at(index + 1) == "*"):
            continue
        if t.fenced[index] or any(s.start <= index < s.end for s in quoted):
            continue
        line = t.line[index]
        if line in done:
            continue
        done.add(line)  # the first colon of a line
        begin = next((p + 1 for p in range(index - 1, -1, -1) if text[p] in LINE_BREAKS), 0)
        end = t.line_end(index) if index + 1 < len(text) else len(text)
        start = index + 1
        while start < end and (text[start].isspace() or text[start] == "*"):
            start += 1
        words = [
            word
            for p, word in t.words
            if begin <= p < index and not text[p].isdecimal() and not in_bracket(text[begin:p])
        ]
        speaks = words and words[-1] in CLASSES["PERSON"] and len(words) <= 4
        if not speaks:
            if not (words and words[-1] in CLASSES["SAYS"]):
                continue
            end = next((p for p in range(start + 1, end) if text[p - 1] in STOPS and text[p].isspace()), end)
        if any(m.kind in DOUBLES or m.kind in "「『" for m in found if index < m.index < end) or start >= end:
            continue
        if any(s.start < end and start < s.end for s in quoted):
            continue
        if any(map(is_word, text[start:end])):
            out.append(Span(start, end, "script"))
    return out


def sentences(t, every):
    number, numbers = 0, []
    text = t.text
    inside = [False] * (len(text) + 1)
    for s in every:
        for p in range(s.start, s.end):
            inside[p] = True
    for index, letter in enumerate(text):
        if letter in LINE_BREAKS and not inside[index]:
            number += 1
        elif not inside[index]:
            back = text[max(index - 3, 0) : index]
            back = back.rstrip(CLOSERS) if back[-1:] in CLOSERS else back
            follows = text[index + 1 : index + 2] or " "
            follows = (text[index + 2 : index + 3] or " ") if follows.isspace() else follows
            latin = letter.isspace() and back[-1:] in set(".!?…") and not follows.islower()
            number += latin or (letter not in CLOSERS and back[-1:] in set("。！？") and back != "")
        numbers.append(number)
    return numbers


def normalize(text):
    return "".join("σ" if one == "ς" else one.lower()[0] for one in re.sub(r"[^\w]", "", text)).replace("ς", "σ")

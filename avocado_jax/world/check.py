"""Parse captions to claims and compare them with the truth, exactly and without a judge.

The parser knows the language of `lexicon` and nothing else. Its rule for other text: a sentence that is not
in the language is one unsupported claim, and a quotation in it is a line of dialogue with no speaker.
"""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterator, Mapping
from functools import cache, lru_cache
from itertools import combinations
from typing import NamedTuple

from avocado_jax.errors import InputError
from avocado_jax.world import lexicon
from avocado_jax.world.caption import template_tables
from avocado_jax.world.script import Claim, Event, claims
from avocado_jax.world.timing import without_times
from avocado_jax.world.vocabulary import VISUALS

LONGEST = 600  # characters; the longest sentence of the language has about 250
SIMILAR = 0.6  # least similarity of two lines that may be one (paper, R_D)
_QUOTATION = re.compile(r'"[^"\n]*"')
_BOUNDARY = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=[A-Z"])')
_CURLY = str.maketrans("“”„‟«»", '""""""')


class Sentence(NamedTuple):
    """A sentence and the events that it states, in its order; no events if it is not in the language."""

    text: str
    events: tuple[Event, ...]


class Scores(NamedTuple):
    """How true a caption is, each from 0 to 1.

    Attributes:
      recall: share of the truth's claims that the caption makes.
      hallucination: share of the caption's claims that are not true or were made before; 0 if it makes none.
      order: of the pairs of true claims that happen at different times, the share stated in that order; where
        the caption has no such pair, 0 if the truth has one and 1 if not.
      dialogue_f1: the paper's R_D between the lines of both.
    """

    recall: float
    hallucination: float
    order: float
    dialogue_f1: float


class Line(NamedTuple):
    """A line of dialogue; the speaker is a name such as "red circle", empty where unknown."""

    speaker: str
    text: str


def parse(caption: str) -> list[Sentence]:
    """The sentences of any text, each with the events that it states."""
    return [Sentence(text, parse_sentence(text)) for text in split_sentences(caption)]


def split_sentences(caption: str) -> Iterator[str]:
    """Sentences end at . ? ! before a capital or a quotation, and at line ends; never inside a quotation."""
    for paragraph in caption.translate(_CURLY).splitlines():
        # What is quoted is masked but for its last mark, which may end the sentence around it.
        masked = _QUOTATION.sub(lambda m: '"' + "_" * (len(m[0]) - 3) + m[0][1:-1][-1:] + '"', paragraph)
        begin = 0
        for boundary in _BOUNDARY.finditer(masked):
            yield paragraph[begin : boundary.start()].strip()
            begin = boundary.end()
        if paragraph[begin:].strip():
            yield paragraph[begin:].strip()


def parse_sentence(text: str) -> tuple[Event, ...]:
    """The events (without times) that a sentence states, in order; none if it is not in the language."""
    if len(text) > LONGEST:
        return ()
    pieces = re.split(r'("[^"]*")', text)
    body = "".join(piece if piece.startswith('"') else piece.lower() for piece in pieces)
    body = " ".join(body.split()).removesuffix(".")
    bodies = [body]
    for word in (*lexicon.CONNECTIVES, *lexicon.LAST_CONNECTIVES):
        if body.startswith(word + " "):
            bodies.append(body.removeprefix(word + " "))
    for body in bodies:
        if event := parse_clause(body):
            return (event,)
        for patterns, read in _FORMS:
            for pattern in patterns:
                for parts in _splits(body, pattern):
                    if events := read(parts):
                        return events
    return ()


@lru_cache(maxsize=4096)
def parse_clause(text: str) -> Event | None:
    """The event of a clause: lower case but for quotations, no full stop."""
    for kind, regex in _clauses():
        if match := regex.fullmatch(text):
            slots = {}
            for name, phrase in match.groupdict().items():
                slots |= {"line": phrase} if name == "line" else _meanings()[name][phrase]
            return Event(kind, 0.0, 0.0, tuple(sorted(slots.items())))
    return None


@cache
def _meanings() -> dict[str, dict[str, dict[str, str]]]:
    """Table -> phrase -> slots."""
    return {
        name: {
            phrase: dict(zip(table.slots, values, strict=True))
            for values, phrases in table.phrases.items()
            for phrase in phrases
        }
        for name, table in lexicon.TABLES.items()
    }


@cache
def _clauses() -> list[tuple[str, re.Pattern]]:
    """A regular expression for every template, made from the tables it was written from."""
    made = []
    for kind, templates in lexicon.TEMPLATES.items():
        for template in templates:
            regex = re.escape(template).replace(r"\{", "{").replace(r"\}", "}")
            for name in template_tables(template):
                escaped = re.escape(name)
                if name == "line":
                    group = r'"(?P<line>[^"]*)"'
                else:
                    phrases = sorted(_meanings()[name], key=len, reverse=True)
                    group = f"(?P<{name}>{'|'.join(map(re.escape, phrases))})"
                regex = regex.replace("{" + escaped + "}", group)
            made.append((kind, re.compile(regex)))
    return made


def _splits(text: str, pattern: str) -> Iterator[dict[str, str]]:
    """Every way to read `text` as a pattern, by field: "{s} as {v}" in "a as b as c" has two."""
    pieces = re.split(r"\{(\w)\}", pattern)  # literal, field, literal, field, ..., ""
    fields, literals = pieces[1::2], pieces[2:-1:2]
    if not text.startswith(pieces[0]):
        return

    def rest(text: str, k: int) -> Iterator[tuple[str, ...]]:
        if k == len(literals):
            yield (text,)
            return
        at = text.find(literals[k])
        while at >= 0:
            for more in rest(text[at + len(literals[k]) :], k + 1):
                yield (text[:at], *more)
            at = text.find(literals[k], at + 1)

    for parts in rest(text[len(pieces[0]) :], 0):
        yield dict(zip(fields, parts, strict=True))


def _read_together(parts: dict[str, str]) -> tuple[Event, ...]:
    sound = parse_clause(parts["s"])
    if sound is None or sound.kind != "effect":
        return ()
    visual = parse_clause(parts["v"])
    if visual is None or visual.kind not in VISUALS:
        return ()
    return (Event("cross", 0.0, 0.0, parts=(visual, sound)),)


def _read_then(parts: dict[str, str]) -> tuple[Event, ...]:
    first = parse_clause(parts["x"])
    second = first and parse_clause(parts["y"])
    return (first, second) if second else ()


def _read_shared(parts: dict[str, str]) -> tuple[Event, ...]:
    first = parse_clause(parts["x"])
    if first is None or not first.get("who"):
        return ()
    second = parse_clause(f"the {first.get('who')} {parts['y']}")
    return (first, second) if second else ()


def _read_opening(parts: dict[str, str]) -> tuple[Event, ...]:
    events = []
    for k, part in enumerate(parts.values()):
        event = parse_clause(part)
        if event is None or event.kind not in (("present",) if k else ("scene", "cut", "present")):
            return ()
        events.append(event)
    return tuple(events)


_FORMS = (
    (lexicon.TOGETHER, _read_together),
    (lexicon.WHERE + lexicon.WHERE_TWO + lexicon.ALONG, _read_opening),
    (lexicon.THEN, _read_then),
    (lexicon.THEN_SHARED, _read_shared),
)


def measure(caption: str, record: Mapping) -> Scores:
    """How true a caption is.

    Args:
      caption: any text; times of scenes in it do not count.
      record: a manifest line of AVWorld; its "events" (texts in this language, starts in seconds) and
        "dialogues" are the truth.
    """
    times: dict[Claim, deque[float]] = defaultdict(deque)
    for event in sorted(record["events"], key=lambda event: event["start"]):
        parsed = parse_sentence(event["text"])
        if not parsed:
            raise InputError(f'{record["id"]}: the event "{event["text"]}" is not in the language of AVWorld')
        for claim in (claim for part in parsed for claim in claims(part)):
            times[_key(claim)].append(event["start"])
    total = sum(map(len, times.values()))
    starts = {start for each in times.values() for start in each}
    made, matched = 0, []  # matched: (place in the caption, start in the truth)
    sentences = parse(without_times(caption))
    index = 0
    for sentence in sentences:
        if not sentence.events:
            made += 1
        for event in sentence.events:
            index += 1
            for claim in claims(event):
                made += 1
                if waiting := times.get(_key(claim)):
                    matched.append((index, waiting.popleft()))
    pairs = [a[1] < b[1] for a, b in combinations(matched, 2) if a[0] != b[0] and a[1] != b[1]]
    order = sum(pairs) / len(pairs) if pairs else float(len(starts) < 2)
    truth = [Line(d["speaker"].removeprefix("the "), d["text"]) for d in record["dialogues"]]
    return Scores(
        recall=len(matched) / total if total else 1.0,
        hallucination=(made - len(matched)) / made if made else 0.0,
        order=order,
        dialogue_f1=dialogue_f1(dialogue_of(sentences), truth),
    )


def _key(claim: Claim) -> Claim:
    """The claim with its spoken line as it is compared."""
    return Claim(claim.kind, tuple((k, normalize(v) if k == "line" else v) for k, v in claim.slots))


def dialogue_of(sentences: list[Sentence]) -> list[Line]:
    """The lines of dialogue in a parsed caption, in order."""
    lines = []
    for sentence in sentences:
        spoken = [Line(e.get("who"), e.get("line")) for e in sentence.events if e.kind == "say"]
        unknown = _QUOTATION.findall(sentence.text) if not sentence.events else ()
        lines += [*spoken, *(Line("", quoted) for quoted in unknown)]
    return lines


def normalize(line: str) -> str:
    """A line as R_D compares it: word characters only, lower case."""
    return re.sub(r"[^\w]", "", line).lower()


def dialogue_f1(lines: list[Line], truth: list[Line]) -> float:
    """The paper's dialogue reward R_D.

    Lines are aligned in order, only where their similarity 1 - distance / longer length is at least 0.6, so
    that the summed similarity is highest and, among such alignments, the speakers agree most often. The score
    is half the summed similarity and half the number of agreeing speakers; the result is the F1 of its shares
    of both lists. Two empty lists give 1, one gives 0.
    """
    lines = [line._replace(text=text) for line in lines if (text := normalize(line.text))]
    truth = [line._replace(text=text) for line in truth if (text := normalize(line.text))]
    if not lines or not truth:
        return float(not lines and not truth)
    best = [(0.0, 0)] * (len(truth) + 1)  # (similarity, speakers) of the lines so far against each prefix
    for line in lines:
        row = [best[0]]
        for j, other in enumerate(truth):
            options = [best[j + 1], row[j]]
            alike = similarity(line.text, other.text)
            if alike >= SIMILAR:
                content, speakers = best[j]
                options.append((content + alike, speakers + (line.speaker == other.speaker)))
            most = max(option[0] for option in options)
            row.append(max((o for o in options if o[0] >= most - 1e-6), key=lambda o: (o[1], o[0])))
        best = row
    score = sum(best[-1]) / 2
    recall, precision = score / len(truth), score / len(lines)
    return 2 * recall * precision / (recall + precision) if score else 0.0


@lru_cache(maxsize=65536)
def similarity(a: str, b: str) -> float:
    """1 - edit distance / the longer length; 0 where bounds show that it is below the threshold."""
    shorter, longer = sorted((len(a), len(b)))
    if not longer:
        return 1.0
    if shorter < SIMILAR * longer:
        return 0.0
    least = max((Counter(a) - Counter(b)).total(), (Counter(b) - Counter(a)).total())
    if 1 - least / longer < SIMILAR:
        return 0.0
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        corner, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            corner, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, corner + (x != y))
    return 1 - row[-1] / longer

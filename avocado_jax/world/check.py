"""Parse captions to claims and compare them with the truth, without a judge.

The parser accepts only the language of `lexicon`. Any other sentence counts as one unsupported claim, and a quotation
in it as a line of dialogue without a speaker.
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
SIMILAR = 0.6  # minimum similarity of two lines that can be aligned (paper, R_D)
_QUOTATION = re.compile(r'"[^"\n]*"')
_BOUNDARY = re.compile(r'(?:(?<=[.!?])|(?<=[.!?]"))\s+(?=[A-Z"])')
_CURLY = str.maketrans("“”„‟«»", '""""""')


class Sentence(NamedTuple):
    """A sentence and the events that it states, in order; no events if it is not in the language."""

    text: str
    events: tuple[Event, ...]


class Scores(NamedTuple):
    """Agreement of a caption with the truth; all values are in [0, 1].

    Attributes:
      recall: share of the true claims that the caption makes.
      hallucination: share of the caption's claims that are false or repeated; 0 without claims.
      order: share of the pairs of true claims with different times that are stated in the right order. Without such
        a pair in the caption: 0 if the truth has one, else 1.
      dialogue_f1: the paper's R_D between the lines of dialogue.
    """

    recall: float
    hallucination: float
    order: float
    dialogue_f1: float


class Line(NamedTuple):
    """A line of dialogue. The speaker is a name such as "red circle", or empty if unknown."""

    speaker: str
    text: str


def parse(caption: str) -> list[Sentence]:
    """Split any text into sentences and parse the events that they state."""
    return [Sentence(text, parse_sentence(text)) for text in split_sentences(caption)]


def split_sentences(caption: str) -> Iterator[str]:
    """Split at . ? ! before a capital or a quotation, and at line ends; never inside a quotation."""
    for paragraph in caption.translate(_CURLY).splitlines():
        # Mask quotations except their last mark, which may end the enclosing sentence.
        masked = _QUOTATION.sub(lambda m: '"' + "_" * (len(m[0]) - 3) + m[0][1:-1][-1:] + '"', paragraph)
        begin = 0
        for boundary in _BOUNDARY.finditer(masked):
            yield paragraph[begin : boundary.start()].strip()
            begin = boundary.end()
        if paragraph[begin:].strip():
            yield paragraph[begin:].strip()


def parse_sentence(text: str) -> tuple[Event, ...]:
    """Parse the events (without times) that a sentence states, in order; none if it is not in the language."""
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
    """Parse a clause without a period, in lower case except for quotations."""
    for kind, regex in _clauses():
        if match := regex.fullmatch(text):
            slots = {}
            for name, phrase in match.groupdict().items():
                slots |= {"line": phrase} if name == "line" else _meanings()[name][phrase]
            return Event(kind, 0.0, 0.0, tuple(sorted(slots.items())))
    return None


@cache
def _meanings() -> dict[str, dict[str, dict[str, str]]]:
    """For each table, the slots that each phrase states."""
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
    """(kind, regular expression) of every template."""
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
    """Every way to match `text` with a pattern, as fields: "{s} as {v}" matches "a as b as c" in two ways."""
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
    """Compare a caption with the truth.

    Args:
      caption: any text; scene times in it are ignored.
      record: a manifest line of AVWorld. Its "events" (texts in the language, starts in seconds) and "dialogues" are
        the truth.
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
    made, matched = 0, []  # matched: (position in the caption, start in the truth)
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
    """The claim with its spoken line normalized."""
    return Claim(claim.kind, tuple((k, normalize(v) if k == "line" else v) for k, v in claim.slots))


def dialogue_of(sentences: list[Sentence]) -> list[Line]:
    """The lines of dialogue of a parsed caption, in order."""
    lines = []
    for sentence in sentences:
        spoken = [Line(e.get("who"), e.get("line")) for e in sentence.events if e.kind == "say"]
        unknown = _QUOTATION.findall(sentence.text) if not sentence.events else ()
        lines += [*spoken, *(Line("", quoted) for quoted in unknown)]
    return lines


def normalize(line: str) -> str:
    """Normalize a line for R_D: word characters only, in lower case."""
    return re.sub(r"[^\w]", "", line).lower()


def dialogue_f1(lines: list[Line], truth: list[Line]) -> float:
    """The paper's dialogue reward R_D.

    Lines are aligned in order. Two lines can be aligned if their similarity, 1 - edit distance / longer length, is at
    least 0.6. The alignment maximizes the summed similarity, then the number of matching speakers. The score is half
    of each sum; the result is the F1 of score / lines of the caption and score / lines of the truth. Two empty lists
    give 1, one empty list gives 0.
    """
    lines = [line._replace(text=text) for line in lines if (text := normalize(line.text))]
    truth = [line._replace(text=text) for line in truth if (text := normalize(line.text))]
    if not lines or not truth:
        return float(not lines and not truth)
    best = [(0.0, 0)] * (len(truth) + 1)  # (similarity, speakers) of the processed lines with each prefix of the truth
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
    """1 - edit distance / longer length; 0 if a bound shows that it is below the threshold."""
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

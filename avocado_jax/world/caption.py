"""Write captions of a script, in chronological order, with varied sentences."""

import random
from collections.abc import Iterable
from functools import cache

from avocado_jax.world import lexicon
from avocado_jax.world.script import Event, Script
from avocado_jax.world.vocabulary import PLACES, VISUALS


def capitalize(sentence: str) -> str:
    """Capitalize the first letter of a sentence."""
    return sentence[:1].upper() + sentence[1:]


def punctuate(sentence: str) -> str:
    """Add a period, unless the sentence ends with a quotation that has a closing mark."""
    return sentence if sentence.endswith(('."', '?"', '!"')) else sentence + "."


def clause(event: Event, rng: random.Random | None = None) -> str:
    """An event as a clause, without capital and period; the first phrasing of the lexicon if `rng` is None.

    Accepts all kinds except "cross".
    """
    pick = rng.choice if rng else (lambda options: options[0])
    slots = dict(event.slots)
    slots.pop("line", None)
    candidates = [t for t in lexicon.TEMPLATES[event.kind] if template_slots(t) == set(slots)]
    text = pick(candidates)
    for name in template_tables(text):
        if name == "line":
            continue
        table = lexicon.TABLES[name]
        if name == "says":
            options = lexicon.SPEECH_VERBS[event.get("line")[-1]]
        else:
            options = table.phrases[tuple(slots[slot] for slot in table.slots)]
        text = text.replace("{" + name + "}", pick(options))
    if event.kind == "say":
        line = event.get("line")
        inside = line[:-1] + "," if line.endswith(".") and not text.endswith("{line}") else line
        text = text.replace("{line}", f'"{inside}"')
    return text


@cache
def template_tables(template: str) -> tuple[str, ...]:
    """The names of the tables in a template, in order."""
    return tuple(piece.split("}")[0] for piece in template.split("{")[1:])


@cache
def template_slots(template: str) -> frozenset[str]:
    """The slots that a template states, except the quoted line."""
    tables = (lexicon.TABLES[name] for name in template_tables(template) if name != "line")
    return frozenset(slot for table in tables for slot in table.slots)


def cross_clause(event: Event, rng: random.Random | None = None) -> str:
    """A "cross" event as a clause; see `clause`."""
    visual, sound = (clause(part, rng) for part in event.parts)
    pattern = rng.choice(lexicon.TOGETHER) if rng else lexicon.TOGETHER[0]
    return pattern.format(v=visual, s=sound)


def statement(event: Event) -> str:
    """The plain sentence for an event; `check` can parse it."""
    return punctuate(capitalize(cross_clause(event) if event.kind == "cross" else clause(event)))


def plain_caption(events: Iterable[Event]) -> str:
    """One plain sentence per event, without variation in wording.

    Events are in chronological order; shapes present at the start of a scene are listed from left to right.
    """

    def order(event: Event) -> tuple[float, tuple[float, float]]:
        return event.start, PLACES[event.get("place")] if event.kind == "present" else (-1.0, 0.0)

    return " ".join(statement(event) for event in sorted(events, key=order))


def visible_events(events: Iterable[Event]) -> list[Event]:
    """The events without sound: sounds are removed, and "cross" events are replaced by their visual part."""
    return [event.parts[0] if event.parts else event for event in events if event.kind not in ("effect", "bed", "say")]


def write_caption(script: Script, which: int = 0) -> str:
    """Write reference caption number `which`: one paragraph per scene, in chronological order."""
    rng = random.Random(f"caption/{script.id}/{which}")
    paragraphs = []
    for scene in script.scenes:
        events = [e for e in script.events if scene.start <= e.start < scene.end]
        opening = [e for e in events if e.kind in ("scene", "cut", "present")]
        beds = [e for e in events if e.kind == "bed"]
        beats = [e for e in events if e not in opening and e not in beds]
        last = scene.end == script.duration
        sentences = [*_open(opening, rng), *(clause(bed, rng) for bed in beds), *_narrate(beats, rng, last)]
        paragraphs.append(" ".join(punctuate(capitalize(sentence)) for sentence in sentences))
    return "\n\n".join(paragraphs)


def _open(events: list[Event], rng: random.Random) -> Iterable[str]:
    """The opening sentences of a scene: its background and the shapes present."""
    clauses = [clause(event, rng) for event in events]
    first = min(len(clauses) - 1, rng.choice((1, 1, 2)))
    if first == 2:
        yield rng.choice(lexicon.WHERE_TWO).format(x=clauses[0], y=clauses[1], z=clauses[2])
    else:
        yield rng.choice(lexicon.WHERE).format(x=clauses[0], y=clauses[1])
    rest = clauses[1 + first :]
    if len(rest) > 1:
        yield rng.choice(lexicon.ALONG).format(x=rest[0], y=rest[1])
        rest = rest[2:]
    yield from rest


def _narrate(events: list[Event], rng: random.Random, last: bool) -> Iterable[str]:
    """The sentences for a sequence of events; the first has no connective, and none occurs twice in a row."""
    k, before = 0, ""
    while k < len(events):
        event, following = events[k], events[k + 1] if k + 1 < len(events) else None
        text = cross_clause(event, rng) if event.kind == "cross" else clause(event, rng)
        first, k = k == 0, k + 1
        combined = following and _join(event, text, following, rng)
        if combined:
            text, k = combined, k + 1
        options = lexicon.CONNECTIVES
        if last and k == len(events) and len(events) > 2:
            options = lexicon.LAST_CONNECTIVES
        chance = 0.8 if options is lexicon.LAST_CONNECTIVES else 0.4
        if not (first or combined) and rng.random() < chance:
            word = rng.choice([option for option in options if option != before])
            text, before = f"{word} {text}", word
        yield text


def _join(event: Event, text: str, following: Event, rng: random.Random) -> str | None:
    """One sentence for two events, if they can be joined; otherwise, or at random, None."""
    if "cross" in (event.kind, following.kind) or event.kind == "say" or rng.random() < 0.5:
        return None
    second = clause(following, rng)
    subject = f"the {event.get('who')} "
    if event.kind in VISUALS and event.kind != "recolor" and second.startswith(subject):
        if text.startswith(subject):
            return rng.choice(lexicon.THEN_SHARED).format(x=text, y=second.removeprefix(subject))
        return None
    if following.kind == "say" and not (second.startswith("the ") and second.endswith('"')):
        return None
    return rng.choice(lexicon.THEN).format(x=text, y=second)

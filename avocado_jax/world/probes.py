"""Probes of a clip from its truth: which statement is true, and which event happens first.

Choices are statements in the language of `lexicon`, so that `check` can answer a probe exactly. A wrong choice states
the event with one slot changed; its claims are false in the clip.
"""

import random
from dataclasses import replace

from avocado_jax.world.caption import statement
from avocado_jax.world.lexicon import NAMES
from avocado_jax.world.script import Claim, Event, Script, claims
from avocado_jax.world.vocabulary import (
    BACKDROPS,
    BEDS,
    CAMERAS,
    COLORS,
    EFFECTS,
    PATTERNS,
    PLACES,
    SIDES,
    SIZES,
    UTTERANCES,
    VISUALS,
    VOICES,
    WORDS,
)

MOST = 12  # maximum per clip
CHOICES = 4
VALUES = {
    "who": NAMES,
    "other": NAMES,
    "size": list(SIZES),
    "place": list(PLACES),
    "side": list(SIDES),
    "color": list(COLORS),
    "backdrop": list(BACKDROPS),
    "pattern": list(PATTERNS),
    "effect": list(EFFECTS),
    "bed": list(BEDS),
    "voice": list(VOICES),
    "line": list(UTTERANCES),
    "word": list(WORDS),
    "where": ["top", "bottom"],
    "camera": list(CAMERAS),
}
QUESTIONS = {
    "static": "Which of these can be seen?",
    "dynamic": "Which of these happens?",
    "auditory": "Which of these is heard?",
    "spatiotemporal": "Which of these is true?",
    "crossmodal": "Which of these happens at one moment?",
}
FIRST = "Which of these happens first?"


def make_probes(script: Script, dimensions: dict[str, str]) -> list[dict]:
    """The manifest probes of a clip, a pure function of the script: {"question", "choices", "answer", "category"}.

    Args:
        dimensions: the category of each kind of event except "cross".
    """
    rng = random.Random(f"probes/{script.id}")
    true = {claim for event in script.events for claim in claims(event)}
    probes = []
    for event in rng.sample(script.events, len(script.events)):
        category = "crossmodal" if event.parts else dimensions[event.kind]
        wrong = _wrong(event, true, rng)
        if len(wrong) == CHOICES - 1:
            probes.append(_probe(QUESTIONS[category], statement(event), wrong, category, rng))
    if order := _order(script, rng):
        probes.insert(0, order)
    return probes[:MOST]


def _probe(question: str, answer: str, wrong: list[str], category: str, rng: random.Random) -> dict:
    choices = [answer, *wrong]
    rng.shuffle(choices)
    return {"question": question, "choices": choices, "answer": answer, "category": category}


def _wrong(event: Event, true: set[Claim], rng: random.Random) -> list[str]:
    """Statements of similar events that are false in the clip."""
    found: dict[str, None] = {}
    for _ in range(40):
        part, *rest = rng.sample(event.parts, len(event.parts)) or (event,)
        changed = _changed(part, rng)
        if changed is None:
            continue
        if rest:  # a "cross" event with another sound or picture
            parts = (changed, *rest) if changed.kind in VISUALS else (*rest, changed)
            changed = replace(event, parts=parts)
        made = claims(changed)
        if not true.intersection(made if not rest else made[-1:]):
            found[statement(changed)] = None
        if len(found) == CHOICES - 1:
            break
    return list(found)


def _changed(event: Event, rng: random.Random) -> Event | None:
    """The event with another value of one slot; None if the result is meaningless."""
    slots = dict(event.slots)
    name = rng.choice([slot for slot in slots if slot in VALUES])
    slots[name] = rng.choice([value for value in VALUES[name] if value != slots[name]])
    if slots.get("who") == slots.get("other", "") or slots.get("color") == slots.get("who", "").split(" ")[0]:
        return None
    return replace(event, slots=tuple(sorted(slots.items())))


def _order(script: Script, rng: random.Random) -> dict | None:
    """A probe that asks which of several true events happens first."""
    happening = [event for event in script.events if event.end > event.start and not _is_state(event)]
    events = rng.sample(happening, min(CHOICES, len(happening)))
    first = min(events, key=lambda event: event.start, default=None)
    if first is None or len({event.start for event in events}) < max(2, len(events)):
        return None
    wrong = [statement(event) for event in events if event is not first]
    return _probe(FIRST, statement(first), wrong, "spatiotemporal", rng)


def _is_state(event: Event) -> bool:
    return event.kind in ("scene", "cut", "present", "bed")

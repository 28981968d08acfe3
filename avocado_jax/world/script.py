"""What happens in a clip: events on a timeline, the claims they make true, and what is kept for test."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from avocado_jax.world.vocabulary import COLORS, SHAPES, UTTERANCES, VISUALS, VOICES

WORLD = "avworld1"  # in every id; a change of what a seed gives changes the number
SPLITS = ("train", "test")
MAX_SECONDS = 60.0


class Level(NamedTuple):
    """How hard a clip is. Numbers are how much of each table above is in use; pairs are (fewest, most)."""

    beats: tuple[int, int]  # things that happen one after another
    scenes: tuple[int, int]
    cast: tuple[int, int]  # shapes in a scene
    colors: int
    shapes: int
    places: int
    effects: int
    voices: int
    lines: int
    nouns: int
    fine: bool  # loudness, turning direction, patterns, written text, music
    camera: bool
    long_lines: bool  # some lines have two sentences, and a narrator speaks too
    size: tuple[int, int]  # pixels (height, width), multiples of 28 and of 16
    fps: int


LEVELS = (
    Level((3, 4), (1, 1), (2, 2), 4, 3, 3, 5, 2, 4, 4, False, False, False, (112, 112), 12),
    Level((4, 6), (1, 1), (2, 3), 6, 5, 5, 8, 3, 6, 8, True, False, False, (112, 224), 12),
    Level((8, 14), (1, 2), (2, 3), 7, 7, 9, 10, 4, 9, 10, True, True, False, (224, 224), 16),
    Level((20, 28), (2, 4), (3, 4), 8, 8, 9, 12, 5, 12, 12, True, True, True, (224, 336), 24),
)


class Claim(NamedTuple):
    """One thing a caption can say, true or not: its kind and its (name, value) slots, sorted by name."""

    kind: str
    slots: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Event:
    """Something that happens from `start` to `end` (seconds).

    Attributes:
      kind: a key of `lexicon.TEMPLATES`, or "cross" for a picture and a sound at one moment (`parts`).
      slots: what a caption says about it, sorted (name, value) pairs.
      actor, other: indices into `Script.actors` of who does it and to whom; -1 is nobody.
      parts: of a "cross" event, its visual event and its effect.
    """

    kind: str
    start: float
    end: float
    slots: tuple[tuple[str, str], ...] = ()
    actor: int = -1
    other: int = -1
    parts: tuple["Event", ...] = ()

    def get(self, slot: str) -> str:
        """The value of a slot; empty where the event has no such slot."""
        return dict(self.slots).get(slot, "")


@dataclass(frozen=True)
class Actor:
    """A shape as it first appears; `scene` is the index of the one scene it is in."""

    color: str
    shape: str
    size: str
    voice: str
    scene: int

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


@dataclass(frozen=True)
class Scene:
    """A stretch between cuts, in seconds."""

    start: float
    end: float
    backdrop: str
    pattern: str


@dataclass(frozen=True)
class Script:
    """Everything that happens in one clip; `duration` (seconds) is a multiple of one half."""

    seed: int
    index: int
    split: str
    level: int
    duration: float
    scenes: tuple[Scene, ...]
    actors: tuple[Actor, ...]
    events: tuple[Event, ...]

    @property
    def id(self) -> str:
        return f"{WORLD}-{self.split}-level{self.level}-seed{self.seed}-{self.index:06d}"


def claims(event: Event) -> tuple[Claim, ...]:
    """The claims that an event makes true: both parts of a cross event and that they come together."""
    if event.kind == "cross":
        visual, sound = event.parts
        pair = tuple(sorted((*visual.slots, *sound.slots, ("visual", visual.kind))))
        return (*claims(visual), *claims(sound), Claim("together", pair))
    if event.kind == "say" and event.get("voice"):
        content = tuple(pair for pair in event.slots if pair[0] != "voice")
        voice = tuple(pair for pair in event.slots if pair[0] != "line")
        return (Claim("say", content), Claim("voice", voice))
    return (Claim(event.kind, event.slots),)


def speech_seconds(line: str, voice: str) -> float:
    """The time a line takes; speech is fitted to it, so that the truth needs no synthesiser."""
    pace, pauses = VOICES.get(voice, 1.0), len(re.findall(r"[.?!] ", line))
    return round(pace * (0.3 + 0.045 * len(line) + 0.7 * pauses), 2)


def held_out(combination: tuple) -> bool:
    """Whether a combination is kept for the test split: (color, shape, action) or (line, noun) indices."""
    if len(combination) == 2:
        return sum(combination) % 5 == 2
    color, shape, action = combination
    return (COLORS.index(color) + 2 * SHAPES.index(shape) + 3 * tuple(VISUALS).index(action)) % 7 == 3


def combinations(event: Event) -> list[tuple]:
    """The combinations of `held_out` that occur in an event."""
    if event.kind == "cross":
        return [found for part in event.parts for found in combinations(part)]
    if event.kind in VISUALS:
        return [(*event.get("who").split(), event.kind)]
    if event.kind == "say":
        return [UTTERANCES[sentence] for sentence in re.split(r"(?<=[.?!]) ", event.get("line"))]
    return []

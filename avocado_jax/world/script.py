"""Scripts: events on a timeline, the claims that they make true, and the combinations held out for testing."""

import re
from dataclasses import dataclass
from typing import NamedTuple

from avocado_jax.world.vocabulary import COLORS, SHAPES, UTTERANCES, VISUALS, VOICES

WORLD = "avworld1"  # part of every id; changes whenever the script of a seed changes
SPLITS = ("train", "test")
MAX_SECONDS = 60.0


class Level(NamedTuple):
    """The difficulty of a clip. Numbers limit the entries in use of each vocabulary table; pairs are (min, max)."""

    beats: tuple[int, int]  # successive events
    scenes: tuple[int, int]
    cast: tuple[int, int]  # shapes per scene
    colors: int
    shapes: int
    places: int
    effects: int
    voices: int
    lines: int
    nouns: int
    fine: bool  # loudness, direction of rotation, patterns, on-screen text, music
    camera: bool
    long_lines: bool  # lines with two sentences, and lines of a narrator
    size: tuple[int, int]  # pixels (height, width), multiples of 28 and of 16
    fps: int


LEVELS = (
    Level((3, 4), (1, 1), (2, 2), 4, 3, 3, 5, 2, 4, 4, False, False, False, (112, 112), 12),
    Level((4, 6), (1, 1), (2, 3), 6, 5, 5, 8, 3, 6, 8, True, False, False, (112, 224), 12),
    Level((8, 14), (1, 2), (2, 3), 7, 7, 9, 10, 4, 9, 10, True, True, False, (224, 224), 16),
    Level((20, 28), (2, 4), (3, 4), 8, 8, 9, 12, 5, 12, 12, True, True, True, (224, 336), 24),
)


class Claim(NamedTuple):
    """An atomic statement, true or false: its kind and its (name, value) slots, sorted by name."""

    kind: str
    slots: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Event:
    """An event from `start` to `end` (seconds).

    Attributes:
      kind: a key of `lexicon.TEMPLATES`, or "cross" for a simultaneous visual event and effect.
      slots: the content of its statement, sorted (name, value) pairs.
      actor, other: indices into `Script.actors` of subject and object; -1: none.
      parts: the visual event and the effect of a "cross" event.
    """

    kind: str
    start: float
    end: float
    slots: tuple[tuple[str, str], ...] = ()
    actor: int = -1
    other: int = -1
    parts: tuple["Event", ...] = ()

    def get(self, slot: str) -> str:
        """The value of a slot; empty if the event does not have the slot."""
        return dict(self.slots).get(slot, "")


@dataclass(frozen=True)
class Actor:
    """A shape as it first appears. `scene`: index of its only scene."""

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
    """The time between two cuts, in seconds."""

    start: float
    end: float
    backdrop: str
    pattern: str


@dataclass(frozen=True)
class Script:
    """The content of a clip. `duration` (seconds) is a multiple of 0.5."""

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
    """The claims that an event makes true; for a "cross" event those of its parts and their simultaneity."""
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
    """The duration of a line. Speech is stretched to it, so that the truth does not depend on the synthesizer."""
    pace, pauses = VOICES.get(voice, 1.0), len(re.findall(r"[.?!] ", line))
    return round(pace * (0.3 + 0.045 * len(line) + 0.7 * pauses), 2)


def held_out(combination: tuple) -> bool:
    """Whether a combination occurs in the test split only: (color, shape, action) or (line, noun) indices."""
    if len(combination) == 2:
        return sum(combination) % 5 == 2
    color, shape, action = combination
    return (COLORS.index(color) + 2 * SHAPES.index(shape) + 3 * tuple(VISUALS).index(action)) % 7 == 3


def combinations(event: Event) -> list[tuple]:
    """The combinations of an event, for `held_out`."""
    if event.kind == "cross":
        return [found for part in event.parts for found in combinations(part)]
    if event.kind in VISUALS:
        return [(*event.get("who").split(), event.kind)]
    if event.kind == "say":
        return [UTTERANCES[sentence] for sentence in re.split(r"(?<=[.?!]) ", event.get("line"))]
    return []

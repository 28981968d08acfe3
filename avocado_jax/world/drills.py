"""Drills: cheap training clips for single elements. Nearly every word of their captions depends on the clip.

A gallery is a still picture with a few shapes, usually one, so that references are unambiguous. A talk is a still
picture with a few sounds. An act is one or two movements without sound.
"""

import math
import random
from typing import NamedTuple

from avocado_jax.world.caption import plain_caption
from avocado_jax.world.director import Director, slots_of
from avocado_jax.world.script import LEVELS, WORLD, Actor, Event, Scene, Script
from avocado_jax.world.vocabulary import BACKDROPS, COLORS, PLACES, SHAPES, SIZES, VOICES

PICTURE = 1.0  # seconds of a still picture


class Drill(NamedTuple):
    """A training clip with a single element.

    Attributes:
      script: a script of level 0.
      picture: seconds of video that the model sees.
      sound: whether the model hears the sound.
      caption: plain sentences for the visible and audible events.
    """

    script: Script
    picture: float
    sound: bool
    caption: str


def make_drill(seed: int, index: int, split: str = "train") -> Drill:
    """Drill number `index`; as with `make_script`, train drills have no held-out combination."""
    rng = random.Random(f"{WORLD}/drill/{seed}/{index}/{split}")
    backdrop = rng.choice(BACKDROPS)
    kind = rng.choices((_gallery, _talk, _act), (2, 1, 1))[0]
    opening = Event("scene", 0.0, 0.0, slots_of(backdrop=backdrop, pattern="plain"))
    actors, events, picture, sound = kind(rng, split)
    present = [
        Event("present", 0.0, 0.0, slots_of(size=actor.size, who=actor.name, place=position), number)
        for number, (actor, position) in enumerate(actors)
    ]
    described = [opening, *present] if kind is _gallery else events
    duration = max(PICTURE, math.ceil(2 * max([event.end for event in events], default=0.0)) / 2)
    script = Script(
        seed,
        index,
        split,
        0,
        duration,
        (Scene(0.0, duration, backdrop, "plain"),),
        tuple(actor for actor, _ in actors),
        (opening, *present, *events),
    )
    return Drill(script, picture or duration, sound, plain_caption(described))


def _actors(rng: random.Random, count: int, places: int) -> list[tuple[Actor, str]]:
    """Shapes of level 0 at different places."""
    level = LEVELS[0]

    def actor() -> Actor:
        look = rng.choice(COLORS[: level.colors]), rng.choice(SHAPES[: level.shapes]), rng.choice(list(SIZES))
        return Actor(*look, rng.choice(list(VOICES)[: level.voices]), 0)

    return [(actor(), position) for position in rng.sample(list(PLACES)[:places], count)]


def _gallery(rng: random.Random, _: str) -> tuple:
    places = rng.choice((LEVELS[0].places, len(PLACES)))
    return _actors(rng, rng.choice((1, 1, 1, 2, 2, 3)), places), [], PICTURE, False


def _director(rng: random.Random, split: str, actors: list[tuple[Actor, str]]) -> Director:
    director = Director(rng, split, LEVELS[0])
    director.actors = [actor for actor, _ in actors]
    director.now = {number: (actor.color, position) for number, (actor, position) in enumerate(actors)}
    return director


def _talk(rng: random.Random, split: str) -> tuple:
    """One speaking shape and effects, in sequence."""
    actors = _actors(rng, 1, LEVELS[0].places)
    director, t, count = _director(rng, split, actors), 0.1, rng.choice((1, 1, 2, 3))
    while len(director.events) < count:
        event = director.effect(t) if rng.random() < 0.3 else director.say(t)
        if event and director.accept(event):
            t = round(event.end + rng.uniform(0.1, 0.3), 2)
    return actors, director.events, PICTURE, True


def _act(rng: random.Random, split: str) -> tuple:
    """One or two movements of one or two shapes."""
    actors, count = _actors(rng, rng.choice((1, 2)), LEVELS[0].places), rng.choice((1, 2))
    director, t = _director(rng, split, actors), 0.3
    while len(director.events) < count:
        event = director.visual(t)
        if event and director.accept(event):
            t = round(event.end + rng.uniform(0.2, 0.5), 2)
    return actors, director.events, 0.0, False

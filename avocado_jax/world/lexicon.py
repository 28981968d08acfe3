"""The phrases for each statement. `caption` writes and `check` parses with these tables.

A table maps the values of one or more slots to phrases with this meaning. A template is a clause with `{tables}`; it
states an event of the kind that it is listed under, with the slots of its tables. Sentence patterns combine clauses.
Clauses are in lower case (except quotations); a sentence starts with a capital.
"""

from itertools import product
from typing import NamedTuple

from avocado_jax.world.vocabulary import BACKDROPS, COLORS, NARRATOR, PATTERNS, SHAPES, SIZES, WORDS


class Table(NamedTuple):
    """Phrases by the values of `slots`. A table without slots has phrases that state no fact of the clip."""

    slots: tuple[str, ...]
    phrases: dict[tuple[str, ...], tuple[str, ...]]


def _single(slot: str, phrases: dict[str, tuple[str, ...]]) -> Table:
    return Table((slot,), {(value,): phrase for value, phrase in phrases.items()})


def article(words: str) -> str:
    """The words with "a" or "an" in front."""
    return ("an " if words[0] in "aeiou" else "a ") + words


NAMES = [f"{color} {shape}" for color, shape in product(COLORS, SHAPES)]
_THE = {name: (f"the {name}",) for name in NAMES}
_NARRATOR = {NARRATOR: ("an unseen narrator", "an off-screen narrator", "the narrator")}
_SIZE_WORDS = {"small": ("small", "little"), "large": ("large", "big")}
_GROUND = {"plain": "plain {}", "striped": "striped {}", "dotted": "dotted {}", "checkered": "checkered {}"}

TABLES: dict[str, Table] = {
    "the": _single("who", _THE),
    "speaker": _single("who", _THE | _NARRATOR),
    "other": _single("other", _THE),
    "a": Table(
        ("size", "who"),
        {
            (size, name): tuple(article(f"{word} {name}") for word in _SIZE_WORDS[size])
            for size, name in product(SIZES, NAMES)
        },
    ),
    "backdrop": Table(
        ("backdrop", "pattern"),
        {
            (color, pattern): tuple(
                article(_GROUND[pattern].format(color)) + noun for noun in (" background", " backdrop")
            )
            for color, pattern in product(BACKDROPS, PATTERNS)
        },
    ),
    "at": _single(
        "place",
        {
            "left": ("on the left", "on the left side of the frame"),
            "center": ("in the center", "in the middle of the frame"),
            "right": ("on the right", "on the right side of the frame"),
            "top": ("near the top", "near the top of the frame"),
            "bottom": ("near the bottom", "near the bottom of the frame"),
        }
        | {
            f"{v} {h}": (f"in the {v} {h} corner", f"in the {v}-{h} corner of the frame")
            for v, h in product(("upper", "lower"), ("left", "right"))
        },
    ),
    "to": _single(
        "place",
        {
            "left": ("to the left", "to the left side of the frame"),
            "center": ("to the center", "to the middle of the frame"),
            "right": ("to the right", "to the right side of the frame"),
            "top": ("to the top", "up to the top of the frame"),
            "bottom": ("to the bottom", "down to the bottom of the frame"),
        }
        | {
            f"{v} {h}": (f"to the {v} {h} corner", f"into the {v}-{h} corner of the frame")
            for v, h in product(("upper", "lower"), ("left", "right"))
        },
    ),
    "from": _single(
        "side",
        {
            "left": ("from the left", "from the left edge"),
            "right": ("from the right", "from the right edge"),
            "top": ("from above", "from the top edge"),
            "bottom": ("from below", "from the bottom edge"),
        },
    ),
    "off": _single(
        "side",
        {
            "left": ("on the left", "past the left edge"),
            "right": ("on the right", "past the right edge"),
            "top": ("at the top", "past the top edge"),
            "bottom": ("at the bottom", "past the bottom edge"),
        },
    ),
    "turn": _single(
        "turn",
        {"clockwise": ("clockwise",), "counterclockwise": ("counterclockwise", "anticlockwise")},
    ),
    "color": _single("color", {color: (color,) for color in COLORS}),
    "grows": _single(
        "resize",
        {
            "grow": ("grows larger", "swells to a bigger size", "gets noticeably bigger", "expands"),
            "shrink": ("shrinks", "shrinks to a smaller size", "gets noticeably smaller", "becomes smaller"),
        },
    ),
    "word": _single("word", {word: (f'"{word}"',) for word in WORDS}),
    "where": _single(
        "where",
        {
            "top": ("at the top of the frame", "across the top of the screen"),
            "bottom": ("at the bottom of the frame", "along the bottom of the screen"),
        },
    ),
    "camera": _single(
        "camera",
        {
            "pan left": ("pans to the left and back again", "swings left and returns"),
            "pan right": ("pans to the right and back again", "swings right and returns"),
            "zoom in": ("zooms in and pulls back again", "pushes in closer and eases back"),
            "zoom out": ("zooms out and comes back again", "draws away and returns to its place"),
        },
    ),
    "effect": _single(
        "effect",
        {
            "bell": ("a bell rings", "a bell chimes"),
            "drum": ("a drum beats", "a drum rolls"),
            "whistle": ("a whistle blows", "a whistle shrills"),
            "buzzer": ("a buzzer sounds", "an electric buzzer goes off"),
            "siren": ("a siren wails", "a siren sounds"),
            "bird": ("a bird chirps", "a bird twitters"),
            "clap": ("someone claps", "a pair of hands claps"),
            "horn": ("a horn honks", "a car horn honks"),
            "knock": ("someone knocks on wood", "a wooden knocking sounds"),
            "harp": ("a harp ripples upward", "a harp glissando sounds"),
            "wind": ("a gust of wind blows", "a rush of wind sweeps past"),
            "laser": ("a laser zaps", "an electronic zap fires"),
        },
    ),
    "bed": _single(
        "bed",
        {
            "piano": ("gentle piano music", "a slow piano melody"),
            "synth": ("upbeat synthesizer music", "a bouncy electronic tune"),
            "drone": ("a dark, humming drone", "a low, ominous drone"),
            "strings": ("warm string music", "a swell of sustained strings"),
            "beat": ("a steady drum beat", "a rhythmic drum groove"),
            "music box": ("a tinkling music box melody", "a delicate music box tune"),
        },
    ),
    "loudly": _single("loudness", {"soft": ("softly", "quietly", "faintly"), "loud": ("loudly", "at full volume")}),
    "in_voice": _single(
        "voice",
        {
            "deep": ("in a deep voice", "in a low, deep voice"),
            "high": ("in a high voice", "in a bright, high-pitched voice"),
            "hoarse": ("in a hoarse voice", "in a rough, croaking voice"),
            "whispering": ("in a whispering voice", "in a hushed, breathy voice"),
            "robotic": ("in a robotic voice", "in a flat, mechanical voice"),
        },
    ),
    "says": Table((), {(): ("says", "asks", "exclaims", "remarks", "calls out", "wants to know", "cries")}),
}
SPEECH_VERBS = {
    ".": ("says", "remarks"),
    "?": ("asks", "wants to know"),
    "!": ("exclaims", "calls out", "cries"),
}
"""The phrases of the table "says" that fit a line, by its last character."""

TEMPLATES: dict[str, tuple[str, ...]] = {
    "scene": (
        "the video opens on {backdrop}",
        "the clip begins with {backdrop}",
        "the scene is set against {backdrop}",
        "at the start we see {backdrop}",
        "the first thing on screen is {backdrop}",
    ),
    "cut": (
        "the scene cuts to {backdrop}",
        "the picture switches abruptly to {backdrop}",
        "there is a sudden cut to {backdrop}",
        "a hard cut brings in {backdrop}",
    ),
    "present": (
        "{a} sits {at}",
        "{a} rests {at}",
        "{a} is visible {at}",
        "{a} hovers {at}",
        "{a} waits {at}",
    ),
    "enter": (
        "{a} slides in {from} and stops {at}",
        "{a} glides into view {from} and settles {at}",
        "{a} comes in {from}, stopping {at}",
        "{a} enters {from} and takes its place {at}",
        "{a} drifts in {from} and comes to rest {at}",
    ),
    "leave": (
        "{the} slides out of the frame {off}",
        "{the} leaves the picture {off}",
        "{the} exits {off}",
        "{the} drifts out of view {off}",
    ),
    "move": (
        "{the} moves {to}",
        "{the} glides {to}",
        "{the} slides {to}",
        "{the} makes its way {to}",
        "{the} travels smoothly {to}",
    ),
    "jump": (
        "{the} jumps up and down",
        "{the} hops in place",
        "{the} bounces on the spot",
        "{the} leaps into the air and lands again",
    ),
    "spin": (
        "{the} spins around",
        "{the} makes a full turn",
        "{the} rotates in place",
        "{the} spins {turn}",
        "{the} makes a full turn {turn}",
        "{the} rotates {turn} in place",
    ),
    "recolor": (
        "{the} turns {color}",
        "{the} changes color to {color}",
        "{the} suddenly becomes {color}",
        "{the} switches to {color}",
    ),
    "resize": ("{the} {grows}", "{the} {grows} before our eyes"),
    "collide": (
        "{the} bumps into {other} and bounces back",
        "{the} crashes into {other} and recoils",
        "{the} runs into {other} and springs back to its place",
        "{the} collides with {other} and rebounds",
    ),
    "text": (
        "the word {word} appears {where}",
        "text reading {word} comes up {where}",
        "a title that reads {word} is shown {where}",
        "the on-screen text {word} pops up {where}",
    ),
    "camera": ("the camera {camera}", "the camera slowly {camera}"),
    "effect": (
        "{effect}",
        "{effect} off screen",
        "{effect} {loudly}",
        "{effect} {loudly} off screen",
    ),
    "bed": (
        "{bed} plays {loudly} in the background",
        "in the background, {bed} plays {loudly}",
        "{bed} can be heard playing {loudly}",
        "on the soundtrack, {bed} plays {loudly}",
    ),
    "say": (
        "{speaker} {says}, {line}",
        "{line} {speaker} {says}",
        "{speaker} {says} {in_voice}, {line}",
        "{in_voice}, {speaker} {says}, {line}",
        "{line} {speaker} {says} {in_voice}",
    ),
}
"""kind -> clauses. {line} is a quotation: any text between quotation marks."""

TOGETHER = (  # {v}: a visual clause, {s}: an effect clause; they are simultaneous
    "{s} as {v}",
    "{s} just as {v}",
    "{v} just as {s}",
    "as {v}, {s}",
    "the moment {v}, {s}",
    "{v}, and at that very moment {s}",
    "{v}, and in the same instant {s}",
)
THEN = (  # two clauses in chronological order
    "{x}, and then {y}",
    "{x}; a moment later, {y}",
    "after {x}, {y}",
    "{x}, after which {y}",
)
THEN_SHARED = ("{x} and then {y}", "{x}, then {y}", "{x} before it {y}")
"""As THEN, but {y} has no subject: it is the subject of {x}."""
WHERE = ("{x}, where {y}", "{x}, and {y}")  # a background and a shape on it
WHERE_TWO = ("{x}, where {y} and {z}", "{x}; {y}, while {z}")
ALONG = ("{x}, and {y}", "{x} while {y}")  # two shapes that are present at the start
CONNECTIVES = (
    "then",
    "next,",
    "after that,",
    "a moment later,",
    "shortly afterward,",
    "soon after,",
    "following this,",
    "a beat later,",
)
LAST_CONNECTIVES = ("finally,", "at the end,", "to finish,")

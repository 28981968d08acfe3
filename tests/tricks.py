"""Captions that exploit the rewards: each function changes an honest caption."""

import re

OPPOSITES = (
    ("red", "green"),
    ("blue", "yellow"),
    ("black", "white"),
    ("left", "right"),
    ("man", "woman"),
    ("boy", "girl"),
    ("top", "bottom"),
    ("loud", "quiet"),
    ("up", "down"),
)
OTHER = dict(OPPOSITES) | {right: left for left, right in OPPOSITES}
WORD = re.compile(r"\b[a-z]+\b")
QUOTE = re.compile(r'"[^"\n]*"|“[^”\n]*”')
SAYS = r"says|said|saying|asks|asking|replies|replying|continues|continuing|explains|explaining|narrates|states|stating"


def outside_quotes(caption, change):
    """Apply `change` to the text outside of quotes."""
    parts = QUOTE.split(caption)
    quotes = [*QUOTE.findall(caption), ""]
    return "".join(change(part) + quote for part, quote in zip(parts, quotes))


def contradicted(caption):
    """Swap the words of each pair of opposites."""
    return outside_quotes(caption, lambda text: WORD.sub(lambda found: OTHER.get(found[0], found[0]), text))


def hedged(caption):
    """Replace each such word by an alternative: "left or right"."""

    def both(found):
        return f"{found[0]} or {OTHER[found[0]]}" if found[0] in OTHER else found[0]

    return outside_quotes(caption, lambda text: WORD.sub(both, text))


def listed(caption):
    """Replace each such word by a list of alternatives that ends with it."""

    def several(found):
        word = found[0]
        return f"{OTHER[word]}, tall, small or {word}" if word in OTHER else word

    return outside_quotes(caption, lambda text: WORD.sub(several, text))


def denied(caption):
    """Declare each sentence false."""
    return outside_quotes(
        caption,
        lambda text: re.sub(r"(^|[.!?]\s+)([A-Z])(?=[a-z])", lambda m: f"{m[1]}It is false that {m[2].lower()}", text),
    )


def spoken_by(caption, speaker):
    """Attribute each quote to one speaker, named directly before it."""
    return QUOTE.sub(lambda found: f". {speaker} says, {found[0]}. ", caption)


def by_everybody(caption):
    """Attribute each quote to all possible speakers."""
    return spoken_by(caption, "A man, a woman, a boy, a girl and a narrator")


def by_anybody(caption):
    """Attribute each quote to "a man"."""
    return spoken_by(caption, "A man")


def looped(caption):
    """Append a repeated sentence of more than a hundred characters."""
    sentence = (
        "The camera then moves slowly across the room and shows everything that was there before, "
        "from the door to the window and back again. "
    )
    return caption + " " + sentence * 25


def half(caption):
    """The first half of the words."""
    words = caption.split()
    return " ".join(words[: len(words) // 2])

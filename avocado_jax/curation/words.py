"""The words of a text with their positions, and search for a sequence of words."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

WORD = re.compile(r"\w+(?:['’]\w+)*")


class Sentence(NamedTuple):
    """A sentence of a caption. `start`: seconds, None if unknown."""

    text: str
    start: float | None = None


class Words:
    """The words of a text; case, spacing and punctuation are ignored.

    Attributes:
        text: the original text.
        words: the normalized words.
        spans: (first, end) of each word in the text.
    """

    def __init__(self, text: str) -> None:
        found = list(WORD.finditer(text))
        self.text = text
        self.words = [normalize(match[0]) for match in found]
        self.spans = [match.span() for match in found]
        self._places: dict[str, list[int]] = defaultdict(list)
        for position, word in enumerate(self.words):
            self._places[word].append(position)

    def places(self, words: Sequence[str]) -> list[int]:
        """Every position at which these words are consecutive."""
        if not words:
            return []
        size = len(words)
        return [
            position
            for position in self._places.get(words[0], ())
            if self.words[position : position + size] == list(words)
        ]


def normalize(word: str) -> str:
    """Normalize a word for comparison."""
    return unicodedata.normalize("NFKC", word).casefold().replace("’", "'")


def words_of(text: str) -> list[str]:
    """The normalized words of a text."""
    return [normalize(match[0]) for match in WORD.finditer(text)]


def as_text(sentences: Sequence[Sentence]) -> str:
    """Join sentences into one text."""
    return " ".join(sentence.text for sentence in sentences)

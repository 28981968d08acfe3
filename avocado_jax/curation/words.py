"""Texts as words with their positions, and the positions of one text's words in another."""

import re
import unicodedata
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

WORD = re.compile(r"\w+(?:['’]\w+)*")


class Sentence(NamedTuple):
    """One sentence of a caption; `start` in seconds, None where it is not known."""

    text: str
    start: float | None = None


class Words:
    """The words of a text, compared without regard to case, spacing and marks.

    Attributes:
        text: the text itself.
        words: its words, folded.
        spans: (first, end) of each word in the text.
    """

    def __init__(self, text: str) -> None:
        found = list(WORD.finditer(text))
        self.text = text
        self.words = [folded(match[0]) for match in found]
        self.spans = [match.span() for match in found]
        self._places: dict[str, list[int]] = defaultdict(list)
        for position, word in enumerate(self.words):
            self._places[word].append(position)

    def places(self, words: Sequence[str]) -> list[int]:
        """Every place where these words stand one after another."""
        if not words:
            return []
        size = len(words)
        return [
            position
            for position in self._places.get(words[0], ())
            if self.words[position : position + size] == list(words)
        ]


def folded(word: str) -> str:
    """A word as it is compared."""
    return unicodedata.normalize("NFKC", word).casefold().replace("’", "'")


def words_of(text: str) -> list[str]:
    """The folded words of a text."""
    return [folded(match[0]) for match in WORD.finditer(text)]


def as_text(sentences: Sequence[Sentence]) -> str:
    """Sentences as one text."""
    return " ".join(sentence.text for sentence in sentences)

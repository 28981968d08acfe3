"""Check that a fused caption keeps every sentence of its source captions, in chronological order.

A sentence is kept if its words are consecutive in the fused caption; a position belongs to one sentence. Punctuation
and case may change, so that two sentences can be joined. Only words that connect sentences in time may be between them.
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from typing import NamedTuple

from avocado_jax.curation.words import Sentence, Words, words_of

ALIKE = 0.6  # a sentence with this share of its words, in order, is altered; with fewer it is lost
SLACK = 1.0  # seconds: tolerance for the order of two sentences, since captioners' times are approximate
LINK = 8  # maximum words between two sentences
LINKS = frozenset(
    words_of(
        "a after afterward afterwards again all along also and as at before beneath briefly but during end "
        "eventually finally first followed following from here immediately in instant it just last lastly "
        "later meantime meanwhile moment moments next now of on once over point right same second seconds "
        "shortly simultaneously since slightly so soon still subsequently suddenly that the then there this "
        "throughout time together until when where while which with"
    )
)
SHOWN = 5  # maximum faults of a kind in a message


class Faults(NamedTuple):
    """The faults of a fused caption."""

    lost: list[str]  # sentences
    altered: list[str]
    misplaced: list[str]
    added: list[str]  # stretches of the fused caption

    def message(self) -> str:
        """The faults as one message; empty if there are none."""
        titles = {
            "lost": "these sentences are missing",
            "altered": "the words of these sentences were changed",
            "misplaced": "these sentences stand too late for their time",
            "added": "these words are in neither caption",
        }
        parts = [
            f"{words}: {'; '.join(f'«{fault[:300]}»' for fault in found[:SHOWN])}"
            + (f" and {len(found) - SHOWN} more" if len(found) > SHOWN else "")
            for words, found in zip(titles.values(), self)
            if found
        ]
        return ". ".join(parts)


class _Kept(NamedTuple):
    """A sentence and its words in the fused caption, [first, end)."""

    first: int
    end: int
    source: int
    number: int
    sentence: Sentence


def fusion_faults(fused: str, *sources: Sequence[Sentence]) -> Faults:
    """Compare a fused caption with its source captions, each in its own order."""
    text = Words(fused)
    kept, missing = _locate(text, sources)
    kept.sort()
    lost, altered, gaps = [], [], _gaps(text, kept)
    for sentence in missing:
        words = words_of(sentence.text)
        near = max(gaps, key=lambda gap: _overlap(words, text.words[gap[0] : gap[1]]), default=(0, 0))
        changed = _overlap(words, text.words[near[0] : near[1]]) >= ALIKE
        (altered if changed else lost).append(sentence.text)
        if changed:
            gaps.remove(near)
    added = [stretch for gap in gaps if (stretch := _added_text(text, *gap))]
    return Faults(lost, altered, _misplaced(kept), added)


def _locate(text: Words, sources: Sequence[Sequence[Sentence]]) -> tuple[list[_Kept], list[Sentence]]:
    """Locate the sentences in the fused caption; return those found and those missing.

    Longer sentences are matched first, since they may contain shorter ones. A sentence of both captions may occur once.
    """
    alike: dict[tuple[str, ...], list[tuple[int, int, Sentence]]] = defaultdict(list)
    for source, sentences in enumerate(sources):
        for number, sentence in enumerate(sentences):
            if words := tuple(words_of(sentence.text)):
                alike[words].append((source, number, sentence))
    taken = [False] * len(text.words)
    kept: list[_Kept] = []
    missing: list[Sentence] = []
    for words in sorted(alike, key=len, reverse=True):
        places = []
        for position in text.places(words):
            if len(places) < len(alike[words]) and not any(taken[position : position + len(words)]):
                taken[position : position + len(words)] = [True] * len(words)
                places.append(position)
        whole = len(places) == len(alike[words])
        members = (
            sorted(alike[words], key=lambda member: (member[2].start or 0.0, member[:2])) if whole else alike[words]
        )
        used: dict[int, int] = defaultdict(int)
        for source, number, sentence in members:
            which = sum(used.values()) if whole else used[source]
            used[source] += 1
            if which < len(places):
                kept.append(_Kept(places[which], places[which] + len(words), source, number, sentence))
            else:
                missing.append(sentence)
    return kept, missing


def _gaps(text: Words, kept: Sequence[_Kept]) -> list[tuple[int, int]]:
    """The word ranges [first, end) outside the kept sentences."""
    gaps, reached = [], 0
    for entry in kept:
        if entry.first > reached:
            gaps.append((reached, entry.first))
        reached = max(reached, entry.end)
    return gaps + [(reached, len(text.words))] * (reached < len(text.words))


def _overlap(words: Sequence[str], stretch: Sequence[str]) -> float:
    """The share of the words that a stretch contains in the same order."""
    matched = SequenceMatcher(None, words, stretch, autojunk=False).get_matching_blocks()
    return sum(block.size for block in matched) / max(1, len(words))


def _added_text(text: Words, first: int, end: int) -> str:
    """The text of a range between kept sentences; empty if it only connects them."""
    stretch = text.text[text.spans[first][0] : text.spans[end - 1][1]]
    connects = (
        end < len(text.words)  # something follows
        and end - first <= LINK
        and set(text.words[first:end]) <= LINKS
        and not re.search(r"[.?!。！？\n\"“”«»]", stretch)
    )
    return "" if connects else stretch


def _misplaced(kept: Sequence[_Kept]) -> list[str]:
    """Sentences that follow later ones: by time, or without times by their order in their own caption."""
    wrong, latest = [], 0.0
    last: dict[int, int] = defaultdict(int)
    for entry in kept:
        if entry.sentence.start is None:
            late = entry.number < last[entry.source]
        else:
            late = entry.sentence.start < latest - SLACK
            latest = max(latest, entry.sentence.start)
        last[entry.source] = max(last[entry.source], entry.number)
        if late:
            wrong.append(entry.sentence.text)
    return wrong

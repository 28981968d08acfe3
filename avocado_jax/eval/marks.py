"""What the rewards matched between captions and references, as positions in the caption."""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

import jax
import numpy as np

from avocado_jax.progress import progress
from avocado_jax.rewards.checklist import BLOCK, WINDOW, features
from avocado_jax.rewards.combine import References, Scored, make_references, score
from avocado_jax.rewards.dialogue import UNIT
from avocado_jax.rewards.explain import alignment
from avocado_jax.rewards.limits import limits_of
from avocado_jax.rewards.text import Caption, Limits, parse, read_texts
from avocado_jax.rewards.vocabulary import Table, code_points, make_table, word_characters

T = TypeVar("T")
REFERENCE_FIELDS = ("caption", "dialogues", "keypoints")
BATCH = 32  # captions at once
ALPHABET, FEATURES = 512, 1024  # most distinct characters of a clip's lines, and most features of its keypoints


def as_compared(table: Table, references: Sequence[Mapping[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """References with the lines of dialogue that R_D compares: those that hold words, or are quoted in the caption."""
    made = [{name: one.get(name) for name in REFERENCE_FIELDS} for one in references]
    unread = [one for one in made if one["dialogues"] is None and one["caption"] is not None]
    if unread:
        read = read_texts(table, [one["caption"] for one in unread], limits)
        for number, one in enumerate(unread):
            caption = jax.tree.map(lambda leaf, n=number: leaf[n], read)
            spans = zip(caption.quote_start[: caption.quotes], caption.quote_end[: caption.quotes])
            texts = ["".join(map(chr, caption.points[first:last])) for first, last in spans]
            one["dialogues"] = [{"speaker": "", "text": text} for text in texts]
    for one in made:
        one["dialogues"] = one["dialogues"] and [
            line for line in one["dialogues"] if len(word_characters(line["text"]))
        ]
    return made


def mark(
    captions: Sequence[str], owners: Sequence[int], references: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What each caption says of its reference, and the references as they were compared (`as_compared`).

    Args:
        captions: composed (NFC).
        owners: of each caption, the number of its reference.
        references: {"caption"?, "dialogues"?, "keypoints"?} of clips.

    Returns:
        For each caption {"quotes": [[first, end, line or -1, similarity, same speaker]], "points": [[score, covered
        share, first, end, ...]]}: places are code points; of a keypoint they are its words in the window where the
        lexical judge found it. Either is None without a reference.
    """
    known = [k for k, of in enumerate(owners) if any(references[of].get(name) is not None for name in REFERENCE_FIELDS)]
    table = make_table()
    texts = [*(captions[k] for k in known), *(one.get("caption") or "" for one in references)]
    limits = limits_of(texts, ([line["text"] for line in one.get("dialogues") or ()] for one in references))
    compared = as_compared(table, references, limits)
    marks = [{"quotes": None, "points": None} for _ in captions]
    if known:
        limit = _rounded(max(16, *(len(one["keypoints"] or ()) for one in compared)))
        made, _ = make_references(table, _filled(references), limits, limit, FEATURES, ALPHABET)
    for first in progress(range(0, len(known), BATCH), "captions compared, in batches"):
        part = known[first : first + BATCH]
        full = _filled(part)
        points, sizes = code_points([captions[k] for k in full], limits.characters)
        of = np.array([owners[k] for k in full])
        selected = jax.tree.map(lambda leaf, of=of: leaf[of], made)
        read, scored, words = jax.tree.map(np.asarray, _score(table, points, sizes, selected, limits))
        for number, k in enumerate(part):
            marks[k] = _marks(*jax.tree.map(lambda leaf, n=number: leaf[n], (read, selected, scored, words)))
    return marks, compared


def _filled(items: Sequence[T]) -> list[T]:
    """The items and copies of the last, up to whole batches: one program serves any number of them."""
    return [*items, *items[-1:] * (-len(items) % BATCH)]


def _rounded(number: int) -> int:
    return 1 << (number - 1).bit_length()


@partial(jax.jit, static_argnums=4)
def _score(table: Table, points: jax.Array, sizes: jax.Array, references: References, limits: Limits) -> Any:
    """(Caption, Scored, hashes of each word) of captions."""

    def one(points: jax.Array, size: jax.Array, reference: References) -> Any:
        caption = parse(table, points, size, limits)
        hashes, weights, places = features(caption.stems, caption.weights, caption.unstated)
        return caption, score(caption, size, reference), (hashes[0], weights[0], places)

    return jax.vmap(one)(points, sizes, references)


def _marks(caption: Caption, reference: References, scored: Scored, words: tuple) -> dict[str, Any]:
    quotes, lines, points = int(caption.quotes), int(reference.dialogue.count), int(reference.keypoints.count)
    return {
        "quotes": None if lines < 0 else _quotes(caption, scored, quotes, lines),
        "points": None if points <= 0 else [_point(caption, reference, scored, words, k) for k in range(points)],
    }


def _quotes(caption: Caption, scored: Scored, quotes: int, lines: int) -> list[list[Any]]:
    matched = dict(alignment(scored.pairs.similarity[:quotes, :lines], scored.pairs.same[:quotes, :lines]))
    marks = []
    for quote in range(quotes):
        span, line = [int(caption.quote_start[quote]), int(caption.quote_end[quote])], matched.get(quote)
        if line is None:
            marks.append([*span, -1, 0, 0])
        else:
            alike = round(float(scored.pairs.similarity[quote, line]) / 2**UNIT, 3)
            marks.append([*span, line, alike, int(scored.pairs.same[quote, line])])
    return marks


def _point(caption: Caption, reference: References, scored: Scored, words: tuple, number: int) -> list[float]:
    """Score and covered share of a keypoint, and the places of its words where it was found."""
    verdict, (hashes, weights, order) = scored.verdict, words
    entry = [round(float(scored.keypoints[number]), 3), round(float(verdict.coverage[number]), 3)]
    if entry[0] <= 0:
        return entry
    wanted = reference.keypoints.features[reference.keypoints.index[number][reference.keypoints.weight[number] > 0]]
    block = order // BLOCK
    window = (block <= verdict.block[number]) & (block > verdict.block[number] - WINDOW)
    for word in order[(weights > 0) & window & np.isin(hashes, wanted)]:
        entry += _word(caption, int(word))
    return entry


def _word(caption: Caption, word: int) -> tuple[int, int]:
    """Where a word begins and ends: at what is no letter, or at the next word."""
    first = int(caption.word_start[word])
    end = int(caption.word_start[word + 1]) if word + 1 < caption.words else int(caption.length)
    last = first + 1
    while last < end and (letter := chr(caption.points[last])) and (letter.isalnum() or letter in "'’"):
        last += 1
    return first, last

"""Positions in captions that the rewards matched with references."""

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
BATCH = 32  # captions per batch
ALPHABET, FEATURES = 512, 1024  # maximum distinct characters of a clip's lines, and features of its keypoints


def as_compared(table: Table, references: Sequence[Mapping[str, Any]], limits: Limits) -> list[dict[str, Any]]:
    """Return references with the lines of dialogue that R_D compares: lines with words, or quotes of the caption."""
    made = [{name: reference.get(name) for name in REFERENCE_FIELDS} for reference in references]
    unread = [reference for reference in made if reference["dialogues"] is None and reference["caption"] is not None]
    if unread:
        read = read_texts(table, [reference["caption"] for reference in unread], limits)
        for number, reference in enumerate(unread):
            caption = jax.tree.map(lambda leaf, n=number: leaf[n], read)
            spans = zip(caption.quote_start[: caption.quotes], caption.quote_end[: caption.quotes])
            texts = ["".join(map(chr, caption.points[first:last])) for first, last in spans]
            reference["dialogues"] = [{"speaker": "", "text": text} for text in texts]
    for reference in made:
        reference["dialogues"] = reference["dialogues"] and [
            line for line in reference["dialogues"] if len(word_characters(line["text"]))
        ]
    return made


def mark(
    captions: Sequence[str], owners: Sequence[int], references: Sequence[Mapping[str, Any]]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Match each caption with its reference. Also returns the compared references (`as_compared`).

    Args:
        captions: composed texts (NFC).
        owners: the index of each caption's reference.
        references: {"caption"?, "dialogues"?, "keypoints"?} of clips.

    Returns:
        For each caption {"quotes": [[first, end, line or -1, similarity, same speaker]], "points": [[score, covered
        share, first, end, ...]]}. Positions are code points. The positions of a keypoint are its words in the window
        with the best score of the lexical judge. Both are None without a reference.
    """
    has_reference = [any(reference.get(name) is not None for name in REFERENCE_FIELDS) for reference in references]
    known = [k for k, owner in enumerate(owners) if has_reference[owner]]
    table = make_table()
    texts = [*(captions[k] for k in known), *(reference.get("caption") or "" for reference in references)]
    lines = ([line["text"] for line in reference.get("dialogues") or ()] for reference in references)
    limits = limits_of(texts, lines)
    compared = as_compared(table, references, limits)
    marks = [{"quotes": None, "points": None} for _ in captions]
    if known:
        limit = _rounded(max(16, *(len(reference["keypoints"] or ()) for reference in compared)))
        made, _ = make_references(table, _filled(references), limits, limit, FEATURES, ALPHABET)
    for first in progress(range(0, len(known), BATCH), "captions compared, in batches"):
        part = known[first : first + BATCH]
        full = _filled(part)
        points, sizes = code_points([captions[k] for k in full], limits.characters)
        rows = np.array([owners[k] for k in full])
        selected = jax.tree.map(lambda leaf, rows=rows: leaf[rows], made)
        read, scored, words = jax.tree.map(np.asarray, _score(table, points, sizes, selected, limits))
        for number, k in enumerate(part):
            marks[k] = _marks(*jax.tree.map(lambda leaf, n=number: leaf[n], (read, selected, scored, words)))
    return marks, compared


def _filled(items: Sequence[T]) -> list[T]:
    """Pad items with copies of the last one to complete batches, so that one program suffices."""
    return [*items, *items[-1:] * (-len(items) % BATCH)]


def _rounded(number: int) -> int:
    return 1 << (number - 1).bit_length()


@partial(jax.jit, static_argnums=4)
def _score(table: Table, points: jax.Array, sizes: jax.Array, references: References, limits: Limits) -> Any:
    """(Caption, Scored, hashes of each word) of captions."""

    def score_one(points: jax.Array, size: jax.Array, reference: References) -> Any:
        caption = parse(table, points, size, limits)
        hashes, weights, places = features(caption.stems, caption.weights, caption.unstated)
        return caption, score(caption, size, reference), (hashes[0], weights[0], places)

    return jax.vmap(score_one)(points, sizes, references)


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
    """Score and covered share of a keypoint, and the positions of its words in the best window."""
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
    """The span of a word, up to the first character that is not a letter, or the next word."""
    first = int(caption.word_start[word])
    end = int(caption.word_start[word + 1]) if word + 1 < caption.words else int(caption.length)
    last = first + 1
    while last < end and (letter := chr(caption.points[last])) and (letter.isalnum() or letter in "'’"):
        last += 1
    return first, last

"""Scores of any number of captions, in batches of similar sizes and few shapes, so that cost follows text length.

B  captions of a batch
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np

from avocado_jax.progress import progress
from avocado_jax.rewards.combine import DEFAULTS, References, Scored, Thresholds, make_references, score
from avocado_jax.rewards.extra import Term
from avocado_jax.rewards.limits import limits_of
from avocado_jax.rewards.text import Caption, Limits, read_texts
from avocado_jax.rewards.vocabulary import Table, make_table

BATCH, CHARACTERS = 32, 2**16  # captions of a batch at most, and their characters
MOST_SCENES = 512  # of a caption, and events of its reference; the rest is truncated
POINTS, FEATURES, ALPHABET = 32, 256, 64  # least capacity: keypoints, their features, characters of the lines


class Entry(NamedTuple):
    """One caption scored, as numpy arrays.

    Attributes:
        number: its index among the captions.
        limits: what was read of it and its reference.
        truncated: something of its reference did not fit.
    """

    number: int
    limits: Limits
    caption: Caption
    reference: References
    scored: Scored
    truncated: bool


def scores(
    table: Table,
    captions: Sequence[str],
    references: Sequence[Mapping[str, Any]],
    tokens: Sequence[float],
    answers: Mapping[str, np.ndarray] | None = None,
    merge: bool = False,
    thresholds: Thresholds = DEFAULTS,
    extra: Sequence[Term] = (),
    timing: bool = False,
) -> Iterator[Entry]:
    """The scores of captions, in batches of similar size: not in their order.

    Args:
        references: of each, "caption", "dialogues" and "keypoints", as `make_references` takes them.
        tokens: the length of each caption for R_L, NaN where it is not known.
        answers: a judge's scores by term, [n, most items]: "checklist", or the lexical judge scores it, and "probes".
        merge: consecutive lines of one speaker are one line.
        thresholds: of the terms.
        extra: further terms, of kind "jax".
        timing: whether to compute the term `timing`.
    """
    limits = [_limits(*pair, merge) for pair in zip(captions, references)]
    order = sorted(range(len(captions)), key=lambda number: (limits[number], len(captions[number])))
    parts: list[list[int]] = []
    for number in order:
        if not parts or limits[parts[-1][0]] != limits[number] or len(parts[-1]) == _rows(limits[number]):
            parts.append([])
        parts[-1].append(number)
    for part in progress(parts, "batches of captions"):
        full = [*part, *part[-1:] * (_rows(limits[part[0]]) - len(part))]
        yield from _batch(
            table,
            [captions[number] for number in full],
            [references[number] for number in full],
            np.array([tokens[number] for number in full], np.float32),
            {term: values[full] for term, values in (answers or {}).items()},
            timing,
            limits[part[0]],
            (thresholds, tuple(extra)),
            part,
        )


def mean_values(
    terms: Sequence[Term], captions: Sequence[str], references: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The mean of each of a user's terms over the captions for which it has a verdict; NaN if there are none."""
    values = {term.name: term.values(captions, references) for term in terms if term.kind == "host"}
    if on_device := [term for term in terms if term.kind == "jax"]:
        entries = list(scores(make_table(), captions, references, [math.nan] * len(captions), extra=on_device))
        values |= {term.name: np.array([one.scored.terms[term.name] for one in entries]) for term in on_device}
    return {
        name: float(np.mean(each[~np.isnan(each)])) if (~np.isnan(each)).any() else math.nan
        for name, each in values.items()
    }


def _rows(limits: Limits) -> int:
    """Captions of a batch: fewer where they are long, so that time and memory are bounded."""
    return max(1, min(BATCH, CHARACTERS // limits.characters))


def _limits(caption: str, reference: Mapping[str, Any], merge: bool) -> Limits:
    """Of a caption and its reference."""
    lines = [one["text"] for one in reference.get("dialogues") or ()]
    return limits_of([caption, reference.get("caption") or ""], [lines])._replace(merge=merge)


def _batch(
    table: Table,
    captions: list[str],
    references: list[Mapping[str, Any]],
    tokens: np.ndarray,
    answers: dict[str, np.ndarray],
    timing: bool,
    limits: Limits,
    terms: tuple,
    numbers: Sequence[int],
) -> Iterator[Entry]:
    given = (len(one.get("events") or ()) for one in references)
    events = min(MOST_SCENES, max(8, *given, *(text.count("[") for text in captions)))
    made, truncated = make_references(table, references, limits, events=1 << (events - 1).bit_length() if timing else 0)
    made = _padded(made)
    if "checklist" in answers:
        limit = made.keypoints.index.shape[1]
        padded = np.pad(answers["checklist"], ((0, 0), (0, limit)), constant_values=np.nan)[:, :limit]
        answers = {**answers, "checklist": padded}
    read = read_texts(table, captions, limits)  # the program that reads the reference captions
    found = read, made, jax.tree.map(np.asarray, _score(read, tokens, made, answers, terms))
    for row, number in enumerate(numbers):
        caption, reference, scored = jax.tree.map(lambda leaf, row=row: leaf[row], found)
        yield Entry(number, limits, caption, reference, scored, bool(truncated[row]))


def _padded(made: References) -> References:
    """Pad references to powers of two, so that there are few shapes."""

    def grown(values: np.ndarray, axis: int, least: int, fill: float) -> np.ndarray:
        size = max(least, 1 << (values.shape[axis] - 1).bit_length())
        widths = [(0, size - values.shape[axis]) if dimension == axis else (0, 0) for dimension in range(values.ndim)]
        return np.pad(values, widths, constant_values=fill)

    points = made.keypoints
    points = points._replace(
        features=grown(points.features, 1, FEATURES, 0xFFFFFFFF),
        **{name: grown(getattr(points, name), 1, POINTS, 0) for name in ("index", "weight", "telling")},
        **{name: grown(getattr(points, name), 1, POINTS, -1) for name in ("dimension", "block")},
    )
    alphabet = grown(made.dialogue.alphabet, 1, ALPHABET, np.iinfo(np.int32).max)
    return made._replace(keypoints=points, dialogue=made.dialogue._replace(alphabet=alphabet))


@partial(jax.jit, static_argnums=4)
def _score(
    captions: Caption,
    tokens: jax.Array,
    references: References,
    answers: dict[str, jax.Array],
    terms: tuple[Thresholds, tuple[Term, ...]],
) -> Scored:
    thresholds, extra = terms

    def one(caption: Caption, length: jax.Array, reference: References, judged: dict[str, jax.Array]) -> Scored:
        given = judged.get("checklist"), judged.get("probes")
        return score(caption, length, reference, thresholds, *given, extra)

    return jax.vmap(one)(captions, tokens, references, answers)

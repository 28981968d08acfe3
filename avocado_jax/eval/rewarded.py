"""Score captions in batches of similar sizes and few shapes, so that the cost is proportional to the text length.

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

BATCH, CHARACTERS = 32, 2**16  # maximum captions of a batch, and maximum characters
MOST_SCENES = 512  # maximum scenes of a caption and events of its reference; more are truncated
POINTS, FEATURES, ALPHABET = 32, 256, 64  # minimum capacities: keypoints, their features, characters of the lines


class Entry(NamedTuple):
    """The result of one caption, as numpy arrays.

    Attributes:
        number: index of the caption.
        limits: limits of the caption and its reference.
        truncated: whether the reference was truncated.
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
    """Yield the scores of captions in batches of similar size, in arbitrary order.

    Args:
        references: mappings for `make_references`.
        tokens: the length of each caption for R_L; NaN if unknown.
        answers: term -> a judge's scores [n, most items], for "probes" and "checklist". Without the latter, the
            lexical judge is used.
        merge: merge consecutive lines of one speaker.
        thresholds: parameters of the terms.
        extra: user terms of kind "jax".
        timing: whether to compute the `timing` term.
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
    """The mean of each user term over the captions with a verdict; NaN without verdicts."""
    values = {term.name: term.values(captions, references) for term in terms if term.kind == "host"}
    if on_device := [term for term in terms if term.kind == "jax"]:
        entries = list(scores(make_table(), captions, references, [math.nan] * len(captions), extra=on_device))
        values |= {term.name: np.array([entry.scored.terms[term.name] for entry in entries]) for term in on_device}
    known = {name: array[~np.isnan(array)] for name, array in values.items()}
    return {name: float(np.mean(array)) if len(array) else math.nan for name, array in known.items()}


def _rows(limits: Limits) -> int:
    """Captions per batch: fewer for long captions, which bounds time and memory."""
    return max(1, min(BATCH, CHARACTERS // limits.characters))


def _limits(caption: str, reference: Mapping[str, Any], merge: bool) -> Limits:
    """The limits of a caption and its reference."""
    lines = [line["text"] for line in reference.get("dialogues") or ()]
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
    counts = (len(reference.get("events") or ()) for reference in references)
    events = min(MOST_SCENES, max(8, *counts, *(text.count("[") for text in captions)))
    made, truncated = make_references(table, references, limits, events=1 << (events - 1).bit_length() if timing else 0)
    made = _padded(made)
    if "checklist" in answers:
        limit = made.keypoints.index.shape[1]
        padded = np.pad(answers["checklist"], ((0, 0), (0, limit)), constant_values=np.nan)[:, :limit]
        answers = {**answers, "checklist": padded}
    read = read_texts(table, captions, limits)  # the same program as for reference captions
    found = read, made, jax.tree.map(np.asarray, _score(read, tokens, made, answers, terms))
    for row, number in enumerate(numbers):
        caption, reference, scored = jax.tree.map(lambda leaf, row=row: leaf[row], found)
        yield Entry(number, limits, caption, reference, scored, bool(truncated[row]))


def _padded(made: References) -> References:
    """Pad references to powers of two, for few shapes."""

    def pad(values: np.ndarray, axis: int, least: int, fill: float) -> np.ndarray:
        size = max(least, 1 << (values.shape[axis] - 1).bit_length())
        widths = [(0, size - values.shape[axis]) if dimension == axis else (0, 0) for dimension in range(values.ndim)]
        return np.pad(values, widths, constant_values=fill)

    points = made.keypoints
    points = points._replace(
        features=pad(points.features, 1, FEATURES, 0xFFFFFFFF),
        **{name: pad(getattr(points, name), 1, POINTS, 0) for name in ("index", "weight", "telling")},
        **{name: pad(getattr(points, name), 1, POINTS, -1) for name in ("dimension", "block")},
    )
    alphabet = pad(made.dialogue.alphabet, 1, ALPHABET, np.iinfo(np.int32).max)
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

    def score_one(caption: Caption, length: jax.Array, reference: References, judged: dict[str, jax.Array]) -> Scored:
        answers = judged.get("checklist"), judged.get("probes")
        return score(caption, length, reference, thresholds, *answers, extra)

    return jax.vmap(score_one)(captions, tokens, references, answers)

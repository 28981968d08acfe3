"""Metrics of captions that need their texts only."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avocado_jax.world.timing import scenes, time_iou
from avocado_jax.world.truth import mean_scores

MIN_SPAN = 24  # characters of a stretch that counts: good captions hold "00000" and "mmmmm"
LONGEST_UNIT = 99


def collapses(text: str, min_span: int = MIN_SPAN) -> bool:
    """Whether a caption falls into repetition (RepCol; facts of the paper's official cleaning rule).

    It does where a unit of 1-49 characters stands five times in a row or more, or one of 50-99 characters four
    times or more, and the stretch has at least `min_span` characters. Characters are code points, line ends among
    them. Takes 99 passes over the text, whatever is in it.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    for unit in range(1, LONGEST_UNIT + 1):
        span = max((5 if unit < 50 else 4) * unit, min_span)
        if span > len(points):
            continue
        # A stretch of `span` characters with this period: as many equal to what follows a unit later, less one unit.
        differ = np.flatnonzero(points[unit:] != points[:-unit])
        borders = np.concatenate([[-1], differ, [len(points) - unit]])
        if np.diff(borders).max() - 1 >= span - unit:
            return True
    return False


def remove_repetitions(text: str) -> str:
    """The text with each repetition cut to one unit (the cleaning rule of the official video-SALMONN-2 evaluation).

    A repetition is a unit of 1-49 characters five times in a row or more, or one of 50-99 four times or more, within
    a line; at most 201 units of it are cut.
    """
    for unit in range(1, LONGEST_UNIT + 1):
        more = 4 if unit < 50 else 3
        text = re.sub(rf"(.{{{unit}}})\1{{{more},200}}", r"\1", text)
    return text


def text_metrics(captions: Sequence[str], lengths: Sequence[int | None]) -> dict[str, float | None]:
    """Measures that need no reference: `repcol`, the share of captions that collapse, and `length`, mean tokens.

    `length` is None where the length of any caption is not known.
    """
    known = [length for length in lengths if length is not None]
    return {
        "repcol": sum(map(collapses, captions)) / len(captions),
        "length": sum(known) / len(known) if len(known) == len(lengths) else None,
    }


def world_metrics(
    captions: Sequence[str], lengths: Sequence[int | None], records: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """The metrics of `evaluate world`: means over the captions of AVWorld's clips, whose truth is `records`.

    `time_iou` is among them if any caption has timed scenes.
    """
    metrics = mean_scores(captions, records) | text_metrics(captions, lengths)
    if any(map(scenes, captions)):
        ious = [time_iou(caption, record) for caption, record in zip(captions, records, strict=True)]
        known = [iou for iou in ious if iou is not None]
        metrics["time_iou"] = sum(known) / len(known) if known else None
    return metrics

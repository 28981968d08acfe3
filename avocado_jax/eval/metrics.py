"""Metrics of caption texts."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from avocado_jax.world.timing import scenes, time_iou
from avocado_jax.world.truth import mean_scores

MIN_SPAN = 24  # minimum characters of a repeated stretch: good captions contain "00000" and "mmmmm"
LONGEST_UNIT = 99


def collapses(text: str, min_span: int = MIN_SPAN) -> bool:
    """Whether a caption falls into repetition (RepCol, by the paper's official cleaning rule).

    True if a unit of 1-49 characters is repeated at least five times in a row, or one of 50-99 characters at least
    four times, and the stretch has at least `min_span` characters. Characters are code points, including line ends.
    Takes 99 passes over any text.
    """
    points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    for unit in range(1, LONGEST_UNIT + 1):
        span = max((5 if unit < 50 else 4) * unit, min_span)
        if span > len(points):
            continue
        # In a stretch of `span` characters with this period, `span - unit` characters equal the one a unit later.
        differ = np.flatnonzero(points[unit:] != points[:-unit])
        borders = np.concatenate([[-1], differ, [len(points) - unit]])
        if np.diff(borders).max() - 1 >= span - unit:
            return True
    return False


def remove_repetitions(text: str) -> str:
    """Replace each repetition by one unit (the cleaning rule of the official video-SALMONN-2 evaluation).

    A repetition is a unit of 1-49 characters at least five times in a row, or one of 50-99 at least four times, within
    a line. At most 201 units are replaced.
    """
    for unit in range(1, LONGEST_UNIT + 1):
        more = 4 if unit < 50 else 3
        text = re.sub(rf"(.{{{unit}}})\1{{{more},200}}", r"\1", text)
    return text


def text_metrics(captions: Sequence[str], lengths: Sequence[int | None]) -> dict[str, float | None]:
    """Metrics without references: `repcol`, the share of captions that collapse, and `length`, mean tokens.

    `length` is None if the length of any caption is unknown.
    """
    known = [length for length in lengths if length is not None]
    return {
        "repcol": sum(map(collapses, captions)) / len(captions),
        "length": sum(known) / len(known) if len(known) == len(lengths) else None,
    }


def world_metrics(
    captions: Sequence[str], lengths: Sequence[int | None], records: Sequence[Mapping[str, Any]]
) -> dict[str, float | None]:
    """The metrics of `evaluate world`: means over captions of AVWorld clips with known truth `records`.

    Includes `time_iou` if any caption has timed scenes.
    """
    metrics = mean_scores(captions, records) | text_metrics(captions, lengths)
    if any(map(scenes, captions)):
        ious = [time_iou(caption, record) for caption, record in zip(captions, records, strict=True)]
        known = [iou for iou in ious if iou is not None]
        metrics["time_iou"] = sum(known) / len(known) if known else None
    return metrics

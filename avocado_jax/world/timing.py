"""Captions with a scene time "[start - end]" in seconds before each sentence, and their time IoU with the truth.

`time_iou` is the host implementation of `rewards.timing`.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from avocado_jax.world.caption import statement
from avocado_jax.world.script import Event

REQUEST = "Begin each sentence with its time in seconds, as [start - end]."  # appended to the prompt of such clips
_TIME = r"((?:[0-9]+:){0,2}[0-9]+(?:\.[0-9]*)?)[sS]?"
LONGEST = 41  # maximum characters of a scene time, brackets included
SCENE = re.compile(rf"\[[ \xa0]?{_TIME}[ \xa0]*[-‐‑‒–—][ \xa0]*{_TIME}[ \xa0]*\]")


def timed_caption(events: Iterable[Event]) -> str:
    """One plain sentence per event, preceded by its time, sorted by start, then end."""
    ordered = sorted(events, key=lambda event: (event.start, event.end))
    return " ".join(f"[{event.start:g} - {event.end:g}] {statement(event)}" for event in ordered)


def scenes(caption: str) -> list[tuple[float, float]]:
    """The (start, end) of each scene of a caption in seconds, in order."""
    found = (match for match in SCENE.finditer(caption) if len(match[0]) <= LONGEST)
    return [(_seconds(match[1]), _seconds(match[2])) for match in found]


def _seconds(time: str) -> float:
    total = 0.0
    for group in time.split(":"):
        total = 60 * total + float(group)
    return total


def without_times(caption: str) -> str:
    """Remove the scene times from a caption."""
    return re.sub(SCENE.pattern + " *", "", caption)


def time_iou(caption: str, record: Mapping[str, Any]) -> float | None:
    """F1 of the summed time IoU between the scenes of a caption and the events of a record, aligned in order.

    2 * sum / (scenes + events): 0 without scenes, None without events.
    """
    caption_scenes = scenes(caption)
    timed = (event for event in record["events"] if isinstance(event.get("end"), int | float))
    truth = sorted((event["start"], event["end"]) for event in timed)
    if not truth:
        return None
    best = [0.0] * (len(truth) + 1)  # summed IoU of the processed scenes with each prefix of the events
    for scene in caption_scenes:
        row = [0.0]
        for index, event in enumerate(truth):
            row.append(max(best[index + 1], row[-1], best[index] + _iou(scene, event)))
        best = row
    return 2 * best[-1] / (len(caption_scenes) + len(truth))


def _iou(first: tuple[float, float], second: tuple[float, float]) -> float:
    overlap = max(0.0, min(first[1], second[1]) - max(first[0], second[0]))
    union = max(0.0, first[1] - first[0]) + max(0.0, second[1] - second[0]) - overlap
    return overlap / union if union else 0.0

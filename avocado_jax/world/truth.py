"""Read the truth of clips from the `clips.jsonl` of a world, and average the scores of captions."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from avocado_jax.errors import InputError
from avocado_jax.jsonl import NUMBER, check_entries, read_lines
from avocado_jax.world.check import measure

FIELDS = {"id": str, "events": list, "dialogues": list}
ENTRIES = {"events": {"text": str, "start": NUMBER}, "dialogues": {"speaker": str, "text": str}}


def read_truth(path: Path, more: Mapping[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Read the manifest lines of a world by id, in order.

    Args:
        more: additional required fields, with their types.

    Raises:
        InputError: the file is missing, a line is not from AVWorld, or an id occurs twice.
    """
    records: dict[str, dict[str, Any]] = {}
    for where, line in read_lines(path, {**FIELDS, **(more or {})}):
        check_entries(where, line, ENTRIES)
        if line["id"] in records:
            raise InputError(f'{where}: a second clip "{line["id"]}"')
        measure("", line)  # raises InputError if an event is not in the language
        records[line["id"]] = line
    return records


def mean_scores(captions: Iterable[str], records: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """The means of `check.measure` over captions, with the metric names of `evaluate world`."""
    scores = [measure(caption, record) for caption, record in zip(captions, records, strict=True)]
    means = [sum(part) / len(part) for part in zip(*scores)]
    return dict(zip(("event_recall", "hallucination", "order", "dialogue_f1"), means, strict=True))

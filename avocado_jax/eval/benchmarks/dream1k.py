"""DREAM-1K: recall of reference events that the caption entails, and precision of the caption's events."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import (
    Answer,
    Ask,
    Benchmark,
    Judged,
    Official,
    Record,
    Unit,
    all_different,
    checked,
    mean,
)
from avocado_jax.jsonl import read_lines
from avocado_jax.remote.answers import read_object
from avocado_jax.remote.call import Malformed

MOST = 10  # maximum events of a caption
VERDICTS = ("entailment", "neutral", "contradiction")


class Told(Answer):
    """The events of a caption."""

    events: list[Annotated[str, Field(min_length=1)]]


class Verdict(Answer):
    """Of one event."""

    number: int
    verdict: Literal["entailment", "neutral", "contradiction"]


class Verdicts(Answer):
    """Of every event."""

    verdicts: list[Verdict]


class Relationship(Answer):
    """Of one event, in the official form; a reason may follow."""

    relationship: Annotated[str, AfterValidator(lambda text: text.strip().lower())]


class Relationships(Answer):
    """Of every event, in their order, in the official form."""

    events: list[Relationship]


def read(path: Path) -> list[Record]:
    """Read the official file: lines {"messages": [user, assistant], "dataset", "extra_info": {"events"}}."""
    return all_different(path, _records(path))


def _records(path: Path) -> Iterator[Record]:
    for where, line in read_lines(path, {"messages": list, "extra_info": dict}):
        events = checked(where, line["extra_info"], {"events": [str]})["events"]
        parts = [
            checked(where, part, {})
            for turn in line["messages"]
            for part in checked(where, turn, {"content": [dict]})["content"]
        ]
        videos = [part["video"] for part in parts if isinstance(part.get("video"), Mapping)]
        names = [video["video_file"] for video in videos if isinstance(video.get("video_file"), str)]
        texts = [part["reference"] for part in parts if isinstance(part.get("reference"), str)]
        questions = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        if len(names) != 1 or len(texts) != 1 or not questions:
            raise InputError(f'{where}: it must have one "video_file", one "reference" and a question')
        subset = line.get("dataset")
        groups = {"subset": subset} if isinstance(subset, str) else {}
        yield Record(PurePosixPath(names[0]).stem, (names[0],), questions[0], texts[0], events, groups)


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """Two units, for recall and precision: {"what": "recall" or "precision", "events", "verdicts"}."""
    units = [await _entailed(ask, "recall", record.truth, caption)]
    reply = await ask("dream-1k-events", {"caption": caption}, Told)
    if reply.value is None:
        return [*units, {"what": "precision", "why": reply.why}]
    return [*units, await _entailed(ask, "precision", reply.value.events[:MOST], record.reference)]


async def _entailed(ask: Ask, what: str, events: Sequence[str], text: str) -> Unit:
    unit = {"what": what, "events": list(events)}
    if not events:
        return unit | {"verdicts": []}

    def read(text: str) -> list[str]:
        try:
            found = read_object(text, Verdicts, python=True).verdicts
        except Malformed:
            official = [event.relationship for event in read_object(text, Relationships, python=True).events]
            if len(official) != len(events) or not set(official) <= set(VERDICTS):
                raise Malformed(
                    f"{len(events)} events were asked about, the answer has {official[:50]}", text
                ) from None
            return official
        by_number = {verdict.number: verdict.verdict for verdict in found}
        if len(by_number) < len(found) or by_number.keys() != set(range(1, len(events) + 1)):
            raise Malformed(f"{len(events)} events were asked about, the answer has {sorted(by_number)[:50]}", text)
        return [by_number[number] for number in range(1, len(events) + 1)]

    fields: dict[str, Any] = {"events": {str(n): event for n, event in enumerate(events, start=1)}, "text": text}
    reply = await ask("dream-1k-entailment", fields, Verdicts, read=read)
    return unit | ({"why": reply.why} if reply.value is None else {"verdicts": reply.value})


def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
    """Mean precision and recall in percent, over the clips of a subset and then over subsets; and the F1 of the means.

    As published, recall is 1 for a reference without events, and precision is 1 for a caption without events.
    """
    shares: dict[str, dict[str, list[float]]] = {"precision": {}, "recall": {}}
    for answers in judged:
        for unit in answers.units:
            if "why" in unit:
                continue
            verdicts = unit["verdicts"]
            share = 100 * verdicts.count("entailment") / len(verdicts) if verdicts else 100.0
            shares[unit["what"]].setdefault(answers.record.groups.get("subset", ""), []).append(share)
    precision, recall = (mean(list(map(mean, shares[name].values()))) for name in ("precision", "recall"))
    f1 = None
    if precision is not None and recall is not None:
        f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return {"f1": f1, "precision": precision, "recall": recall}


def _if_complete(units: list[Unit]) -> list[Unit]:
    return [] if any("why" in unit for unit in units) else units


BENCHMARK = Benchmark(
    "dream-1k",
    "DREAM-1K",
    ("dream-1k-events", "dream-1k-entailment"),
    read,
    judge,
    measure,
    "f1",
    sound=False,
    official=Official(
        (
            "A clip of which any answer is invalid is left out of precision and recall.",
            "Captions and references are judged in lower case.",
        ),
        text=str.lower,
        treat=_if_complete,
    ),
    typical={"dream-1k-events": Told(events=["somebody does something to something"] * MOST)},
)

"""video-SALMONN-2 test set: gold events that a caption misses or states incorrectly, and hallucinations."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import AliasChoices, Field

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
    percent,
    read_json,
    valid,
)
from avocado_jax.eval.metrics import remove_repetitions
from avocado_jax.remote.answers import read_object
from avocado_jax.remote.call import Malformed

MOST = 500  # maximum hallucinations of a caption; larger counts are invalid
Count = Annotated[int, Field(ge=0)]


class Events(Answer):
    """Events by their numbers, or how many; a prompt may ask for either."""

    missed: list[int] | Count
    incorrect: list[int] | Count
    hallucination: list[str] | Count


class Reasoned(Answer):
    """An event by its number; a reason may follow."""

    number: int = Field(validation_alias=AliasChoices("number", "event", "id"))


class AnyEvents(Answer):
    """As `Events`, with lists of objects that give a reason; the official form has counts, and lists beside them."""

    missed: list[int | Reasoned] | Count
    incorrect: list[int | Reasoned] | Count
    hallucination: list[str | dict[str, Any]] | Count


def read(path: Path) -> list[Record]:
    """Read the official file: [{"video", "conversations": [human, gpt], "events"}]."""
    return all_different(path, _records(path))


def _records(path: Path) -> Iterator[Record]:
    for number, entry in enumerate(read_json(path, list), start=1):
        where = f"{path}: clip {number}"
        clip = checked(where, entry, {"video": str, "conversations": [dict], "events": [str]})
        turns = {
            turn["from"]: turn["value"]
            for turn in (checked(where, turn, {"from": str, "value": str}) for turn in clip["conversations"])
        }
        if not {"human", "gpt"} <= turns.keys() or not clip["events"]:
            raise InputError(
                f'{where}: "conversations" must have a turn of "human" and of "gpt", and "events" an event'
            )
        prompt = turns["human"].replace("<image>\n", "").replace("<video>\n", "").strip()
        yield Record(clip["video"], (clip["video"],), prompt, turns["gpt"], clip["events"])


async def judge(record: Record, caption: str, ask: Ask) -> list[Unit]:
    """One unit: {"events" (count), "missed", "incorrect", "hallucination"}, from the judge's answer."""
    events = record.truth
    numbered = {str(number): text for number, text in enumerate(events, start=1)}

    def check(answer: AnyEvents) -> AnyEvents:
        counted = [answer.missed, answer.incorrect]
        events_of = [event for part in counted if isinstance(part, list) for event in part]
        named = [event.number if isinstance(event, Reasoned) else event for event in events_of]
        if len(set(named)) < len(named) or not set(named) <= set(range(1, len(events) + 1)):
            raise Malformed(f"of {len(events)} events the answer names {named[:50]}")
        if sum(map(count, counted)) > len(events) or count(answer.hallucination) > MOST:
            raise Malformed(f"{len(events)} events were asked about, the answer counts {answer!r:.200}")
        return answer

    fields = {"events": numbered, "caption": caption}
    reply = await ask("video-salmonn-2", fields, Events, check, lambda text: read_object(text, AnyEvents, python=True))
    if reply.value is None:
        return [{"why": reply.why}]
    return [{"events": len(events), **reply.value.model_dump()}]


def count(part: list[Any] | int) -> int:
    """The count of a list, or the count itself."""
    return part if isinstance(part, int) else len(part)


def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
    """Per hundred events over all clips: missed events; incorrect events and hallucinations; and their sum."""
    units = valid(judged)
    events = sum(unit["events"] for unit in units)
    missed, wrong, invented = (
        sum(count(unit[name]) for unit in units) for name in ("missed", "incorrect", "hallucination")
    )
    return {
        "miss": percent(missed, events),
        "hallucination": percent(wrong + invented, events),
        "total": percent(missed + wrong + invented, events),
    }


BENCHMARK = Benchmark(
    "video-salmonn-2",
    "video-SALMONN-2 test set",
    ("video-salmonn-2",),
    read,
    judge,
    measure,
    "total",
    rounds=7,
    official=Official(("Repetitions are cut from captions before they are judged.",), text=remove_repetitions),
)

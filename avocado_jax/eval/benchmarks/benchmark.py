"""The interface of benchmarks: records from the official file, questions to a judge, and figures from the answers."""

import json
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from pydantic import BaseModel, model_validator

from avocado_jax.errors import InputError
from avocado_jax.jsonl import NAMES
from avocado_jax.remote.chat import Reply

A = TypeVar("A", bound=BaseModel)
Unit = dict[str, Any]  # one question to the judge: its result, or "why" it has no valid answer; optionally its "type"


@dataclass(frozen=True)
class Record:
    """A clip of a benchmark."""

    id: str  # id in the official file
    videos: tuple[str, ...]  # possible file names of the clip; names without a suffix match any suffix
    prompt: str | None  # the captioner's prompt; None: its default
    reference: str | None  # the reference caption, if the benchmark has one
    truth: Any  # the reference data for the judge
    groups: Mapping[str, str] = field(default_factory=dict)  # kind -> group, such as the duration, for figures by group


class Judged(NamedTuple):
    """A record and the judge's units for its caption in one round."""

    record: Record
    units: list[Unit]


class Ask(Protocol):
    """Asks the judge with a prompt template."""

    def __call__(
        self,
        prompt: str,
        fields: Mapping[str, Any],
        schema: type[A],
        check: Callable[[Any], Any] = ...,
        read: Callable[[str], Any] | None = ...,
    ) -> Awaitable[Reply[Any]]:
        """Ask one question.

        Args:
            schema: the answer format of the built-in prompts.
            check: converts an answer to the used value; raises Malformed if it is invalid.
            read: parses the answer's text for `check`, including the formats of official prompts. Default: an object of
                `schema`. Raises Malformed.
        """


@dataclass(frozen=True)
class Official:
    """The official rules of a benchmark that differ from the default (`evaluate --official`).

    Attributes:
        notes: the differences, one sentence each; eval/README.md lists them.
        text: preprocessing of captions and references before judging.
        treat: maps a record's units to the units of the official measure.
    """

    notes: tuple[str, ...] = ()
    text: Callable[[str], str] = str
    treat: Callable[[list[Unit]], list[Unit]] = list


@dataclass(frozen=True)
class Benchmark:
    """A benchmark."""

    name: str
    title: str
    prompts: tuple[str, ...]  # the judge's prompts in eval/prompts
    read: Callable[[Path], list[Record]]  # reads the official file; raises InputError
    judge: Callable[[Record, str, Ask], Awaitable[list[Unit]]]
    measure: Callable[[Sequence[Judged]], dict[str, float | None]]  # figures from the valid answers
    headline: str  # the figure that selects the median round
    rounds: int = 1  # rounds of judging, as published
    sound: bool = True
    frames: int | None = None  # maximum frames of a clip, if lower than usual
    official: Official = Official()
    typical: Mapping[str, Any] = field(default_factory=dict)  # prompt -> assumed answer in a dry run
    beside: bool = False  # clip names are relative to the folder of the file


def officially(benchmark: Benchmark) -> Benchmark:
    """Return the benchmark with the official measure."""

    def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
        return benchmark.measure(
            [answers._replace(units=benchmark.official.treat(answers.units)) for answers in judged]
        )

    return replace(benchmark, measure=measure)


class Answer(BaseModel):
    """A judge's answer. Upper and lower case of its fields is one: official prompts write them as they like."""

    @model_validator(mode="before")
    @classmethod
    def _lower(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        lowered = {name.strip().lower(): value for name, value in fields.items()}
        if len(lowered) < len(fields):
            raise ValueError("a field twice")
        return lowered


def read_json(path: Path, kind: type) -> Any:
    """Read the JSON value of a file.

    Raises:
        InputError: the file cannot be read, is not valid JSON, or has another type of value.
    """
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not JSON, or truncated: {error}") from None
    if not isinstance(value, kind):
        raise InputError(f"{path}: must be {NAMES[kind]} of the benchmark's clips")
    return value


def checked(where: str, entry: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """Check that an object of an official file has these fields with these types ([T]: a list of T), and return it.

    Raises:
        InputError: a field is missing or has another type.
    """
    if not isinstance(entry, dict):
        raise InputError(f"{where}: not an object")
    for name, kind in fields.items():
        inner = kind[0] if isinstance(kind, list) else None
        value = entry.get(name)
        if not isinstance(value, list if inner else kind) or (inner and not all(isinstance(v, inner) for v in value)):
            wanted = f"a list of which each is {NAMES[inner]}" if inner else NAMES[kind]
            raise InputError(f'{where}: "{name}" must be {wanted}')
    return entry


def all_different(path: Path, records: Iterator[Record]) -> list[Record]:
    """Check that the records of a file have unique ids and are not empty.

    Raises:
        InputError: two records have the same id, or there are no records.
    """
    found: dict[str, Record] = {}
    for record in records:
        if record.id in found:
            raise InputError(f"{path}: a second clip {json.dumps(record.id)}")
        found[record.id] = record
    if not found:
        raise InputError(f"{path}: no clips in it")
    return list(found.values())


def valid(judged: Sequence[Judged]) -> list[Unit]:
    """All units with a valid answer."""
    return [unit for answers in judged for unit in answers.units if "why" not in unit]


def answered(unit: Unit, **answer: Any) -> Unit:
    """Set the answer of a unit without a valid answer."""
    return {name: value for name, value in unit.items() if name != "why"} | answer


def percent(part: float, whole: float) -> float | None:
    """100 * part / whole; None if `whole` is 0."""
    return 100 * part / whole if whole else None


def mean(values: Sequence[float]) -> float | None:
    """The mean; None without values."""
    return sum(values) / len(values) if values else None

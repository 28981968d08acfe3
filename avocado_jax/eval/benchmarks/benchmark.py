"""The interface of a benchmark: records from its official file, questions to a judge, and figures from the answers."""

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
Unit = dict[str, Any]  # one question to the judge: its result, or "why" there is no valid answer; perhaps its "type"


@dataclass(frozen=True)
class Record:
    """One clip of a benchmark."""

    id: str  # as the official file has it
    videos: tuple[str, ...]  # file names under which the clip may lie; without a suffix: any
    prompt: str | None  # the captioner's prompt; None: its default
    reference: str | None  # a caption, if the benchmark has any
    truth: Any  # what the judge compares with
    groups: Mapping[str, str] = field(default_factory=dict)  # such as its duration: figures are given for each


class Judged(NamedTuple):
    """A record and the judge's units for its caption in one round."""

    record: Record
    units: list[Unit]


class Ask(Protocol):
    """Asks the judge in the words of a prompt's file."""

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
            schema: the form of the answer that our prompts request.
            check: an answer to what is used of it; raises Malformed if it is invalid.
            read: the answer's text to what `check` gets, in any form that official prompts ask for; by default an
                object of `schema`. Raises Malformed.
        """


@dataclass(frozen=True)
class Official:
    """The official treatment of a benchmark where ours differs (`evaluate --official`).

    Attributes:
        notes: the differences, a sentence each; eval/README.md lists them.
        text: applied to captions and references before they are judged.
        treat: a record's units to those that the official measure counts.
    """

    notes: tuple[str, ...] = ()
    text: Callable[[str], str] = str
    treat: Callable[[list[Unit]], list[Unit]] = list


@dataclass(frozen=True)
class Benchmark:
    """One benchmark."""

    name: str
    title: str
    prompts: tuple[str, ...]  # the judge's, files of eval/prompts
    read: Callable[[Path], list[Record]]  # the official file; InputError: it is not
    judge: Callable[[Record, str, Ask], Awaitable[list[Unit]]]
    measure: Callable[[Sequence[Judged]], dict[str, float | None]]  # answers that are not valid left out
    headline: str  # the measure by which the median round is chosen
    rounds: int = 1  # rounds of judging, as published
    sound: bool = True
    frames: int | None = None  # of a clip at most, where that is less than usual
    official: Official = Official()
    typical: Mapping[str, Any] = field(default_factory=dict)  # by prompt: answers that a dry run assumes
    beside: bool = False  # clips are named relative to the file


def officially(benchmark: Benchmark) -> Benchmark:
    """The benchmark with the official measure."""

    def measure(judged: Sequence[Judged]) -> dict[str, float | None]:
        return benchmark.measure([one._replace(units=benchmark.official.treat(one.units)) for one in judged])

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
    """The JSON value of a file.

    Raises:
        InputError: the file cannot be read, is cut or otherwise no JSON, or holds another kind of value.
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
    """Check that an object of an official file has these fields of these types ([T]: a list of T); return it.

    Raises:
        InputError: it is not so.
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
    """The records of a file, which are some and have ids of their own.

    Raises:
        InputError: they do not.
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
    return [unit for one in judged for unit in one.units if "why" not in unit]


def answered(unit: Unit, **answer: Any) -> Unit:
    """A unit without a valid answer, with this one."""
    return {name: value for name, value in unit.items() if name != "why"} | answer


def percent(part: float, whole: float) -> float | None:
    """Of a hundred; None of nothing."""
    return 100 * part / whole if whole else None


def mean(values: Sequence[float]) -> float | None:
    """None of nothing."""
    return sum(values) / len(values) if values else None

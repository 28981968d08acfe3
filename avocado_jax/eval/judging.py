"""Captions before a judge: prompts from files, questions in rounds, answers that are valid or told as missing."""

import json
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import Benchmark, Judged, Record, Unit
from avocado_jax.progress import progress
from avocado_jax.remote.answers import read_object, response_format
from avocado_jax.remote.chat import Reply

PROMPTS = Path(__file__).parent / "prompts"
PARTED = re.compile(r"^---\s*$", re.MULTILINE)
PLACE = re.compile(r"\{\{(\w+)\}\}")
FIELDS = {  # that a prompt may name
    "video-salmonn-2": {"events", "caption"},
    "ugc-videocap": {"reference", "caption"},
    "multiple-choice": {"caption", "question", "choices"},
    "vdc-answer": {"caption", "question"},
    "vdc-grade": {"question", "answer", "prediction"},
    "dream-1k-events": {"caption"},
    "dream-1k-entailment": {"events", "text"},
}


class Prompt(NamedTuple):
    """The words of one question, with places for fields."""

    system: str  # may be empty
    user: str

    def messages(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        """The messages with the fields in their places; what is in a field is never taken for a place."""
        material = json.dumps(fields, ensure_ascii=False, indent=1)
        texts = {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
            for name, value in {**fields, "material": material}.items()
        }
        turns = {"system": self.system, "user": self.user}
        return [
            {"role": role, "content": PLACE.sub(lambda place: texts[place[1]], text)}
            for role, text in turns.items()
            if text
        ]


class Judge(Protocol):
    """Who answers: an endpoint (`remote.chat.ChatClient`) or a model here (`eval.local_judge.LocalJudge`)."""

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        read: Callable[[str], Any],
        *,
        options: Mapping[str, Any] | None = None,
        sample: int = 0,
    ) -> Reply[Any]:
        """Ask one question."""

    def each(self, works: Iterable[Coroutine]) -> Iterator[tuple[int, Any]]:
        """Run many that ask; (number, result) of each as it ends."""


def read_prompts(benchmark: Benchmark, folder: Path | None) -> dict[str, Prompt]:
    """The prompts of a benchmark's judge, our own or those of a folder.

    Raises:
        InputError: one is not there, or names a field that there is not, or none.
    """
    prompts = {}
    for name in benchmark.prompts:
        path = (folder or PROMPTS) / f"{name}.md"
        try:
            parts = PARTED.split(path.read_text(encoding="utf-8"), maxsplit=1)
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise InputError(f"{path}: not UTF-8: {error}") from None
        system, user = (part.strip() for part in (["", *parts])[-2:])
        places = set(PLACE.findall(system + user))
        known = FIELDS[name] | {"material"}
        if not user or not places or not places <= known:
            told = f"names {{{{{sorted(places - known)[0]}}}}}" if places - known else "names no field"
            raise InputError(f"{path}: {told}; there are {', '.join(f'{{{{{one}}}}}' for one in sorted(known))}")
        prompts[name] = Prompt(system, user)
    return prompts


def judge_captions(
    benchmark: Benchmark,
    records: Sequence[Record],
    captions: Mapping[str, str],
    judge: Judge,
    prompts: Mapping[str, Prompt],
    rounds: int,
) -> list[list[Judged]]:
    """What the judge says of each record's caption, [rounds][records].

    Raises:
        InputError: as the judge.
    """

    async def one(number: int, record: Record) -> list[Unit]:
        async def ask(
            prompt: str,
            fields: Mapping[str, Any],
            schema: type[BaseModel],
            check: Callable[[Any], Any] = lambda answer: answer,
        ) -> Reply[Any]:
            messages = prompts[prompt].messages(fields)
            options = response_format(schema)
            return await judge.ask(
                messages, lambda text: check(read_object(text, schema)), options=options, sample=number
            )

        return await benchmark.judge(record, captions[record.id], ask)

    works = (one(number, record) for number in range(rounds) for record in records)
    units: dict[int, list[Unit]] = {}
    for place, found in progress(judge.each(works), "captions judged", rounds * len(records)):
        units[place] = found
    every = [Judged(record, []) for _ in range(rounds) for record in records]
    told = [judged._replace(units=units[place]) for place, judged in enumerate(every)]
    return [told[first : first + len(records)] for first in range(0, len(told), len(records))]

"""Judge captions: prompts from files, rounds of questions, and validated answers."""

import asyncio
import hashlib
import json
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from pydantic import BaseModel

from avocado_jax.errors import InputError
from avocado_jax.eval.benchmarks.benchmark import Benchmark, Judged, Record, Unit
from avocado_jax.progress import progress
from avocado_jax.remote.answers import read_object, response_format
from avocado_jax.remote.cache import open_cache
from avocado_jax.remote.call import Malformed
from avocado_jax.remote.chat import Endpoint, Reply, estimate, request

PROMPTS = Path(__file__).parent / "prompts"
PARTED = re.compile(r"^---\s*$", re.MULTILINE)
PLACEHOLDER = re.compile(r"\{\{(\w+)\}\}")
FIELDS = {  # allowed placeholders of each prompt
    "video-salmonn-2": {"events", "caption"},
    "ugc-videocap": {"reference", "caption"},
    "multiple-choice": {"caption", "question", "choices"},
    "probes": {"caption", "questions"},
    "vdc-answer": {"caption", "question"},
    "vdc-grade": {"question", "answer", "prediction"},
    "dream-1k-events": {"caption"},
    "dream-1k-entailment": {"events", "text"},
}


class Prompt(NamedTuple):
    """A prompt template with placeholders for fields."""

    system: str  # may be empty
    user: str

    @property
    def digest(self) -> str:
        """A hash of the text."""
        return hashlib.sha256(json.dumps(self).encode()).hexdigest()[:16]

    def messages(self, fields: Mapping[str, Any]) -> list[dict[str, str]]:
        """Substitute fields for placeholders. Placeholders in the text of a field are not substituted."""
        material = json.dumps(fields, ensure_ascii=False, indent=1)
        texts = {
            name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, indent=1)
            for name, value in {**fields, "material": material}.items()
        }
        turns = {"system": self.system, "user": self.user}
        return [
            {"role": role, "content": PLACEHOLDER.sub(lambda match: texts[match[1]], text)}
            for role, text in turns.items()
            if text
        ]


class JudgeEnded(Exception):
    """The judge has stopped: its budget is exhausted, or it does not respond."""


class Judge(Protocol):
    """The interface of endpoints (`remote.chat.ChatClient`) and local models (`eval.local_judge.LocalJudge`).

    Attributes:
        ended: the reason why it has stopped; empty: it has not.
    """

    ended: str

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        read: Callable[[str], Any],
        *,
        options: Mapping[str, Any] | None = None,
        sample: int = 0,
    ) -> Reply[Any]:
        """Ask one question."""

    def run_all(self, works: Iterable[Coroutine]) -> Iterator[tuple[int, Any]]:
        """Run coroutines that ask questions; yield (index, result) of each on completion."""


def read_prompts(benchmark: Benchmark, folder: Path | None) -> dict[str, Prompt]:
    """Read the prompts of a benchmark's judge: the built-in ones, or those in a folder.

    Raises:
        InputError: a prompt is missing, or has an unknown placeholder or none.
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
        placeholders = set(PLACEHOLDER.findall(system + user))
        known = FIELDS[name] | {"material"}
        if not user or not placeholders or not placeholders <= known:
            problem = f"names {{{{{sorted(placeholders - known)[0]}}}}}" if placeholders - known else "names no field"
            raise InputError(f"{path}: {problem}; there are {', '.join(f'{{{{{name}}}}}' for name in sorted(known))}")
        prompts[name] = Prompt(system, user)
    return prompts


def judge_captions(
    benchmark: Benchmark,
    records: Sequence[Record],
    captions: Mapping[str, str],
    judge: Judge,
    prompts: Mapping[str, Prompt],
    rounds: int,
    structured: bool = True,
    dry: bool = False,
) -> list[list[Judged]]:
    """Judge each record's caption. Returns the answers [rounds][records].

    Args:
        structured: request the built-in answer format with `response_format`. Other prompts may use another format.
        dry: the judge gives no answers (`DryJudge`); questions that depend on an answer use a typical answer.

    Raises:
        InputError: see the judge.
        JudgeEnded: the judge has stopped. Its answers are cached.
    """

    ended: list[str] = []

    async def judge_record(number: int, record: Record) -> list[Unit]:
        async def ask(
            prompt: str,
            fields: Mapping[str, Any],
            schema: type[BaseModel],
            check: Callable[[Any], Any] = lambda answer: answer,
            read: Callable[[str], Any] | None = None,
        ) -> Reply[Any]:
            read = read or partial(read_object, schema=schema, python=True)
            reply = await judge.ask(
                prompts[prompt].messages(fields),
                lambda text: check(read(text)),
                options=response_format(schema) if structured else {},
                sample=number,
            )
            if reply.value is not None:
                return reply
            if judge.ended:
                ended.append(judge.ended)
            return Reply(benchmark.typical.get(prompt)) if dry else reply

        return await benchmark.judge(record, captions[record.id], ask)

    works = (judge_record(number, record) for number in range(rounds) for record in records)
    units: dict[int, list[Unit]] = {}
    for index, found in progress(judge.run_all(works), "captions judged", rounds * len(records)):
        units[index] = found
    if ended:  # checked after the loop, so that pending calls are still answered
        raise JudgeEnded(ended[0])
    every = [Judged(record, []) for _ in range(rounds) for record in records]
    answered = [judged._replace(units=units[index]) for index, judged in enumerate(every)]
    return [answered[first : first + len(records)] for first in range(0, len(answered), len(records))]


class DryJudge:
    """Counts the calls to an endpoint without sending them. Uses cached answers.

    Attributes:
        counts: "calls", "tokens" (estimated) and "cached" answers.
    """

    ended = ""

    def __init__(self, endpoint: Endpoint):
        self.counts = {"calls": 0, "tokens": 0, "cached": 0}
        self._endpoint, self._cache = endpoint, open_cache(endpoint.cache)
        self._known: set[str] = set()

    async def ask(
        self,
        messages: Sequence[Mapping[str, Any]],
        read: Callable[[str], Any],
        *,
        options: Mapping[str, Any] | None = None,
        sample: int = 0,
    ) -> Reply[Any]:
        """Like `ChatClient.ask`, but returns only cached answers."""
        name, body = request(self._endpoint, messages, options, sample)
        if known := self._cache.get(name):
            try:
                value = read(known["answer"])
                self.counts["cached"] += 1
                return Reply(value, known["answer"])
            except Malformed:
                pass
        if name not in self._known:  # count equal questions once
            self._known.add(name)
            self.counts["calls"] += 1
            self.counts["tokens"] += estimate(body)
        return Reply(None, why="a dry run")

    def run_all(self, works: Iterable[Coroutine]) -> Iterator[tuple[int, Any]]:
        """Run the coroutines sequentially."""
        for number, work in enumerate(works):
            yield number, asyncio.run(work)

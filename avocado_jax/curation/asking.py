"""Requests about a clip: answered from the journal or by the endpoint, validated, and repeated with their faults."""

import asyncio
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Generic, TypeVar

from pydantic import BaseModel

from avocado_jax.curation.answers import Faulty
from avocado_jax.curation.content import Parts
from avocado_jax.curation.journal import Journal
from avocado_jax.remote.answers import response_format
from avocado_jax.remote.call import Malformed
from avocado_jax.remote.chat import ChatClient

T = TypeVar("T")
TRIES = 3  # answers requested before a question is rejected
REPEATED = 20_000  # maximum characters of an invalid answer that are sent back
SHORT = 8  # shorter keys are not redacted: they may be words of an answer
SPENT = "the budget of"  # prefix of the client's error for a call over the budget
AGAIN = "This answer cannot be used: {}. Answer again, in full and in the same form, with this put right."


class Rejected(Exception):
    """The clip does not become a training example. `stage`: where it was rejected."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class Unanswered(Exception):
    """The endpoint did not answer; another run may succeed."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class Stopped(Exception):
    """The run ended before this clip was processed."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """The request of a stage.

    Attributes:
        about: JSON data that identifies the content, for the key of the answer.
        content: builds the content of the user message; called only if the answer is not in the journal.
        read: parses an answer; raises Malformed if it is invalid.
    """

    stage: str
    about: Any
    content: Callable[[], Awaitable[str | Parts]]
    schema: type[BaseModel]
    read: Callable[[str], T]


class Asker:
    """Sends the requests of all clips, on the client's event loop.

    Attributes:
        why: why the run ended early; empty while it continues.
        exhausted: whether the reason is the budget.
    """

    def __init__(self, client: ChatClient, journal: Journal, pause: float, patience: int) -> None:
        """`pause`: minimum seconds between calls; `patience`: stop after this many clips in a row without answers."""
        self.client, self.journal = client, journal
        self.why, self.exhausted = "", False
        self._pause, self._patience = pause, patience
        self._next = 0.0  # time of the next call, by the loop's clock
        self._silent = 0  # clips in a row without an answer
        key = os.environ.get(client.endpoint.key_variable, "").strip()
        self._key = key if len(key) >= SHORT else ""

    async def ask(self, clip: str, question: Question[T]) -> T:
        """Return the parsed value of the first valid answer.

        Raises:
            Rejected: all TRIES answers are invalid.
            Unanswered: the endpoint did not answer.
            Stopped: the call would exceed the budget, or the endpoint does not answer any clip.
        """
        options = response_format(question.schema)
        earlier: list[dict[str, str]] = []  # invalid answers and their faults
        for attempt in range(1, TRIES + 1):
            key = self._key_of(question, earlier)
            answer = self.journal.get(key)
            if answer is None:
                messages = [
                    {"role": "system", "content": prompt(question.stage)},
                    {"role": "user", "content": await question.content()},
                    *earlier,
                ]
                answer = await self._answer(question.stage, messages, options)
                self.journal.put(key, clip, question.stage, attempt, answer, **self.spent())
            try:
                return question.read(answer)
            except Malformed as error:
                fault = error
            earlier += [
                {"role": "assistant", "content": answer[:REPEATED] or "-"},
                {"role": "user", "content": AGAIN.format(fault)},
            ]
        stage = fault.stage if isinstance(fault, Faulty) and fault.stage else question.stage
        raise Rejected(stage, f"{fault} (after {TRIES} answers)")

    def knows(self, question: Question[Any]) -> bool:
        """Whether the journal has an answer to the question."""
        return self.journal.get(self._key_of(question, [])) is not None

    def note_spent(self) -> None:
        """Record the cost of calls without an answer, for the budget of later runs."""
        if self.spent() != self.journal.spent:
            self.journal.put("", "", "end", 0, "", **self.spent())

    def spent(self) -> dict[str, int]:
        """The cost of the folder, earlier runs included."""
        before = self.journal.before
        return {
            "calls": before["calls"] + self.client.counts["calls"],
            "tokens": before["tokens"] + self.client.tokens,
        }

    def _key_of(self, question: Question[Any], earlier: list[dict[str, str]]) -> str:
        """A digest of all inputs of an answer; the clip is not decoded for it."""
        endpoint = self.client.endpoint
        about = [question.schema.model_json_schema(), question.about, earlier]
        return digest([prompt(question.stage), endpoint.model, dict(endpoint.options), about])

    async def _answer(self, stage: str, messages: list[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The raw answer of the endpoint, with the API key redacted: some servers echo it."""
        if self.why:
            raise Stopped
        now = self.client.now()
        self._next = max(now, self._next) + self._pause
        await asyncio.sleep(self._next - self._pause - now)
        reply = await self.client.ask(messages, lambda text: text, options=options)
        text = reply.text.replace(self._key, "***") if self._key else reply.text
        if text or reply.value is not None:  # a truncated answer too: it is recorded as invalid
            self._silent = 0
            return text
        if reply.why.startswith(SPENT):
            self.why, self.exhausted = self.why or "the budget would be exceeded", True
            raise Stopped
        self._silent += 1
        if self._silent >= self._patience:
            self.why = self.why or f"no answer to {self._silent} questions in a row"
        raise Unanswered(stage, reply.why)


@cache
def prompt(stage: str) -> str:
    """The system prompt of a stage."""
    return (files("avocado_jax.curation") / "prompts" / f"{stage}.md").read_text(encoding="utf-8").strip()


def digest(value: Any) -> str:
    """A digest of JSON data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

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
TRIES = 3  # answers to a question until one can be used
REPEATED = 20_000  # characters of a bad answer that the model is shown again
SHORT = 8  # characters of a key that may be a word of an answer
SPENT = "the budget of"  # prefix of the client's error when a call would exceed it
AGAIN = "This answer cannot be used: {}. Answer again, in full and in the same form, with this put right."


class Rejected(Exception):
    """A clip does not become a training caption: at which stage, and why."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class Unanswered(Exception):
    """The endpoint gave no answer: the clip may do better in another run."""

    def __init__(self, stage: str, reason: str) -> None:
        super().__init__(reason)
        self.stage = stage


class Stopped(Exception):
    """The run ends before this clip is done."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """What is asked at a stage.

    Attributes:
        about: plain data that decides the answer, beside the prompt of the stage.
        content: makes what the model is shown; called only where it is asked, and may take its time.
        read: an answer to what is used of it; raises Malformed where it cannot be used.
    """

    stage: str
    about: Any
    content: Callable[[], Awaitable[str | Parts]]
    schema: type[BaseModel]
    read: Callable[[str], T]


class Asker:
    """Asks for clips, all on the client's loop.

    Attributes:
        why: the reason why the run ends; empty while it continues.
        exhausted: whether it ends because the next call would exceed the budget.
    """

    def __init__(self, client: ChatClient, journal: Journal, pause: float, patience: int) -> None:
        """`pause`: seconds from one call to the next, at least; `patience`: clips in a row without an answer."""
        self.client, self.journal = client, journal
        self.why, self.exhausted = "", False
        self._pause, self._patience = pause, patience
        self._next = 0.0  # on the loop's clock, when the next call may be made
        self._silent = 0  # clips in a row that had no answer
        key = os.environ.get(client.endpoint.key_variable, "").strip()
        self._key = key if len(key) >= SHORT else ""

    async def ask(self, clip: str, question: Question[T]) -> T:
        """What is read of the first answer that can be used.

        Raises:
            Rejected: no answer of TRIES can be used.
            Unanswered: the endpoint did not answer, though it was asked as long as it allows.
            Stopped: the budget would be exceeded, or the endpoint answers nobody.
        """
        options = response_format(question.schema)
        earlier: list[dict[str, str]] = []  # answers that could not be used, and what was wrong with each
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
        """Whether a question has been answered before."""
        return self.journal.get(self._key_of(question, [])) is not None

    def note_spent(self) -> None:
        """Put down what calls have cost that had no answer, for the budget of later runs."""
        if self.spent() != self.journal.spent:
            self.journal.put("", "", "end", 0, "", **self.spent())

    def spent(self) -> dict[str, int]:
        """What the folder has cost so far, earlier runs included."""
        before = self.journal.before
        return {
            "calls": before["calls"] + self.client.counts["calls"],
            "tokens": before["tokens"] + self.client.tokens,
        }

    def _key_of(self, question: Question[Any], earlier: list[dict[str, str]]) -> str:
        """A digest of all that decides an answer, without a look at the clip."""
        endpoint = self.client.endpoint
        about = [question.schema.model_json_schema(), question.about, earlier]
        return digest([prompt(question.stage), endpoint.model, dict(endpoint.options), about])

    async def _answer(self, stage: str, messages: list[Mapping[str, Any]], options: Mapping[str, Any]) -> str:
        """The raw answer of the endpoint, without the key, which servers like to repeat."""
        if self.why:
            raise Stopped
        now = self.client.now()
        self._next = max(now, self._next) + self._pause
        await asyncio.sleep(self._next - self._pause - now)
        reply = await self.client.ask(messages, lambda text: text, options=options)
        text = reply.text.replace(self._key, "***") if self._key else reply.text
        if text or reply.value is not None:  # also a truncated one: it is kept, and cannot be read
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
    """A digest of plain data."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]

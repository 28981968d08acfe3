"""The client of an OpenAI-compatible chat endpoint: concurrent requests, each retried until its answer is valid."""

import asyncio
import hashlib
import json
import os
import random
import sys
import threading
from collections import Counter
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import aiohttp

from avocado_jax.errors import InputError
from avocado_jax.remote.cache import Answers, open_cache
from avocado_jax.remote.call import Final, Malformed, Passing, call, content, model_of, proxy_for, usage
from avocado_jax.remote.ledger import Ledger

T = TypeVar("T")
Messages = Sequence[Mapping[str, Any]]  # "content": a text, or a list of content parts
FIRST_PAUSE, LAST_PAUSE = 0.5, 30.0  # seconds between retries: exponential backoff
ANSWER_TOKENS = 1024  # assumed tokens of an answer, if the request has no limit and the endpoint reports no usage
IMAGE_TOKENS = 1024  # assumed tokens of a picture
AUDIO_BYTES = 4096  # base64 bytes of sound per token: 16 kHz, 16 bits, ten tokens a second


@dataclass(frozen=True)
class Endpoint:
    """The address of an endpoint, and the limits of time, retries and cost."""

    url: str  # of the API: https://api.openai.com/v1
    model: str
    key_variable: str = "OPENAI_API_KEY"  # environment variable of the API key; if unset or empty, no key is sent
    cache: Path | Answers | None = None  # a folder that any number of processes may share, or an open cache
    concurrency: int = 16  # concurrent calls
    timeout: float = 60.0  # seconds per call, to its last byte
    patience: float = 600.0  # seconds per question without a deadline, from its first call
    tries: int = 3  # answers per question until one is valid
    blanks: int | None = None  # separate limit for answers without text; None: they count as tries
    max_calls: int = 1_000_000  # of this client, or of all runs in the ledger
    max_tokens: int | None = None  # the same for tokens, of prompts and answers
    ledger: Ledger | None = None  # sums of calls and tokens over all runs
    breaker: int | None = None  # after this many questions in a row without an answer, all further ones are refused
    options: Mapping[str, Any] = field(default_factory=lambda: {"temperature": 0})  # additional fields of each request
    name: str = "judge"  # in messages on stderr


@dataclass(frozen=True)
class Reply(Generic[T]):
    """The result of a question."""

    value: T | None  # the parsed answer; None: no valid answer
    text: str = ""  # the raw answer: the valid one, or the last invalid one
    why: str = ""  # the error, if there is no value


class ChatClient:
    """A client of an endpoint; its event loop runs in a separate thread.

    Raw answers are cached by a hash of the request, and equal questions in flight share one call. Transient errors
    (429, 5xx, timeouts, lost connections) are retried with exponential backoff or after Retry-After, until the
    question's deadline. The API key is sent in the header only.

    Attributes:
        counts: "calls"; "cached" answers; "passing" (transient) errors; "malformed" answers; "refused" calls, by the
            endpoint or over the budget; "late" questions, which passed their deadline; answers "not cached" because
            the disk is full.
        tokens: total, as reported by the endpoint; `estimate` for answers without usage and for cancelled calls.
        returned: number of answers by reported model name.
        ended: why further questions are refused: the budget, or an endpoint that does not answer. Empty: they are not.
        exhausted: whether the reason is the budget.
        trouble: the latest error message. The first of each kind is printed on stderr.

    Raises:
        InputError: the URL is invalid; from a question: the endpoint refuses the first request (key, model or
            address).
    """

    def __init__(self, endpoint: Endpoint):
        parts = urlsplit(endpoint.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"the {endpoint.name}'s URL is {endpoint.url!r}, not http://HOST/... or https://HOST/...")
        self.endpoint = endpoint
        self.counts: Counter[str] = Counter()
        self.returned: Counter[str] = Counter()
        self.tokens = 0
        self.trouble = self.ended = ""
        self.exhausted = False
        self._key = os.environ.get(endpoint.key_variable, "").strip()
        self._cache = open_cache(endpoint.cache)
        self._ledger = endpoint.ledger or Ledger()
        self._proxy = proxy_for(endpoint.url)
        self._silent = 0  # questions in a row without an answer
        self._freed = asyncio.Event()  # replaced and set when a call ends
        self._asking: dict[str, asyncio.Task[Reply]] = {}
        self._reserved = 0  # tokens of the calls in flight
        self._answered = False
        self._unformatted = False  # the endpoint does not support `response_format`
        self._session: aiohttp.ClientSession | None = None
        self._slots = asyncio.Semaphore(endpoint.concurrency)  # calls
        self._turns = asyncio.Semaphore(endpoint.concurrency)  # questions without a deadline
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=endpoint.name, daemon=True)
        self._thread.start()

    async def ask(
        self,
        messages: Messages,
        read: Callable[[str], T],
        *,
        options: Mapping[str, Any] | None = None,
        sample: int = 0,
        deadline: float | None = None,
    ) -> Reply[T]:
        """Ask a question. Must be awaited on the client's loop, in a coroutine that `start` or `run_all` runs.

        Args:
            messages: chat messages with any content parts: text, image_url, input_audio.
            read: parses the text of the answer to a value other than None; raises Malformed if it is invalid. The
                request is then repeated, up to `tries` times.
            options: additional fields of this request, such as `answers.response_format`.
            sample: distinguishes repetitions of the same question, for repeated measurements.
            deadline: by the loop's clock; default: `patience` seconds from the first call of the question.
        """
        name, body = request(self.endpoint, messages, options, sample)
        task = self._asking.get(name)
        if task is None:
            if (known := self._cache.get(name)) is not None:
                try:
                    value = read(known["answer"])
                    self.counts["cached"] += 1
                    self.returned[known.get("returned") or ""] += 1
                    return Reply(value, known["answer"])
                except Malformed:
                    pass  # another reader accepted it; this one asks again
            if self.ended:
                return Reply(None, why=self.count("refused", self.ended))
            task = self._asking[name] = asyncio.create_task(self._complete(name, body, read, deadline))
            task.add_done_callback(lambda _: self._asking.pop(name))
        return await task

    def start(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        """Run a coroutine on the client's loop; it must not block (use `asyncio.to_thread`)."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run_all(self, works: Iterable[Coroutine[Any, Any, T]], at_once: int | None = None) -> Iterator[tuple[int, T]]:
        """Run coroutines concurrently and yield (index, result) as each ends; `works` is consumed lazily.

        `at_once` limits how many run at once; default: `concurrency`. An exception, or leaving the iterator early,
        cancels all.
        """
        running: dict[Future[T], int] = {}
        waiting = enumerate(works)
        try:
            while True:
                for number, work in islice(waiting, (at_once or self.endpoint.concurrency) - len(running)):
                    running[self.start(work)] = number
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        finally:
            for future in running:
                future.cancel()

    def now(self) -> float:
        """The time of the loop's clock, for deadlines."""
        return self._loop.time()

    def count(self, kind: str, error: object) -> str:
        """Count an error, print the first of its kind on stderr, and return its message as one line without the key."""
        self.trouble = self._redacted(f"{error}")
        if not self.counts[kind]:
            print(f"{self.endpoint.name}: {kind}: {self.trouble}", file=sys.stderr)
        self.counts[kind] += 1
        return self.trouble

    def close(self) -> None:
        """Cancel all running questions and stop the thread."""
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> "ChatClient":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _end(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._session:
            await self._session.close()

    async def _complete(self, name: str, body: dict, read: Callable[[str], T], deadline: float | None) -> Reply[T]:
        """Repeat the call until an answer is valid or a limit is reached."""
        if deadline is None:
            async with self._turns:  # time spent in the queue does not count against `patience`
                return await self._complete(name, body, read, self._loop.time() + self.endpoint.patience)
        tries, blanks, pause, text, why = 0, 0, FIRST_PAUSE, "", ""
        try:
            async with asyncio.timeout_at(deadline):
                while tries < self.endpoint.tries and blanks < (self.endpoint.blanks or 1):
                    answer = ""
                    try:
                        answer, tokens, returned = await self._call(body)
                        text, value = answer, read(answer)
                        kept = {"model": self.endpoint.model, "answer": text, "tokens": tokens, "returned": returned}
                        self._keep(name, kept)
                        self.returned[returned] += 1
                        self._silent = 0
                        return Reply(value, text)
                    except Malformed as error:
                        answer = answer or error.text
                        why, text = self.count("malformed", error), answer or text
                        counted = bool(answer) or self.endpoint.blanks is None
                        tries, blanks = tries + counted, blanks + (not counted)
                    except Passing as error:
                        why = self.count("passing", error)
                        seconds = max(error.wait, pause * random.uniform(0.5, 1.5))
                        if self._loop.time() + seconds > deadline:
                            raise TimeoutError from None
                        await asyncio.sleep(seconds)
                        pause = min(2 * pause, LAST_PAUSE)
        except Final as error:
            why = self.count("refused", error)
        except TimeoutError:
            why = self.count("late", f"{why or 'no answer'}; given up")
        self._silent = 0 if text else self._silent + 1
        if not self.ended and self.endpoint.breaker and self._silent >= self.endpoint.breaker:
            self.ended = f"no answer to {self._silent} questions in a row; the latest error: {why}"
        return Reply(None, text, why)

    async def _call(self, body: dict[str, Any]) -> tuple[str, int, str]:
        """Make one call; return the text of the answer, its tokens, and the reported model name.

        Raises:
            Passing, Final, Malformed: no valid answer.
            InputError: the endpoint has never answered and refuses the request.
        """
        endpoint = self.endpoint
        url = endpoint.url.rstrip("/") + "/chat/completions"
        if self._unformatted:
            body = {name: value for name, value in body.items() if name != "response_format"}
        expected = estimate(body)
        async with self._slots:
            await self._reserve(expected)
            spent = expected  # if the call is cancelled: the server received it
            try:
                raw = await call(self._open_session(), url, body, endpoint.timeout)
                reported = usage(raw)
                spent = expected if reported is None else reported
            except Passing as error:
                spent = expected if error.late else 0
                raise
            except Final as error:
                spent = 0
                if error.status in (400, 422) and "response_format" in body and "response_format" in str(error):
                    self._unformatted = True  # the prompt states the format too, and the answer is validated anyway
                    raise Passing(str(error)) from None
                if error.status in (401, 403, 404) and not self._answered:
                    raise InputError(self._redacted(str(error))) from None
                raise
            finally:
                self._reserved -= expected
                self.tokens += spent
                self._ledger.add(0, spent - expected)
                self._freed.set()
                self._freed = asyncio.Event()
        text = content(raw)
        self._answered = True
        return text, spent, model_of(raw)

    async def _reserve(self, expected: int) -> None:
        """Reserve the budget for a call of about `expected` tokens; wait while calls in flight may free some.

        Raises:
            Final: the budget is exhausted.
        """
        endpoint, ledger = self.endpoint, self._ledger
        while endpoint.max_tokens is not None and ledger.tokens + expected > endpoint.max_tokens and self._reserved:
            await self._freed.wait()
        why = ""
        if ledger.calls >= endpoint.max_calls:
            why = f"the budget of {endpoint.max_calls} calls is spent"
        elif endpoint.max_tokens is not None and ledger.tokens + expected > endpoint.max_tokens:
            why = (
                f"the budget of {endpoint.max_tokens} tokens: {ledger.tokens} are spent, and a call of about "
                f"{expected} would exceed it"
            )
        if why:
            self.ended, self.exhausted = self.ended or why, True
            raise Final(why)
        self.counts["calls"] += 1
        self._reserved += expected
        ledger.add(1, expected)

    def _open_session(self) -> aiohttp.ClientSession:
        if self._session is None:
            headers = {"Authorization": f"Bearer {self._key}"} if self._key else {}
            connector = aiohttp.TCPConnector(limit=0)
            self._session = aiohttp.ClientSession(connector=connector, headers=headers, proxy=self._proxy)
        return self._session

    def _redacted(self, words: str) -> str:
        """`words` on one line, with the API key redacted: some servers echo it."""
        words = " ".join(words.split())
        return words.replace(self._key, "***") if self._key else words

    def _keep(self, name: str, kept: dict[str, Any]) -> None:
        try:
            self._cache.put(name, kept)
        except OSError as error:  # the answer is valid nevertheless
            self.count("not cached", error)


def request(
    endpoint: Endpoint, messages: Messages, options: Mapping[str, Any] | None, sample: int
) -> tuple[str, dict[str, Any]]:
    """The cache key and the body of a request."""
    body = {"model": endpoint.model, "messages": list(messages), **endpoint.options, **(options or {})}
    return hashlib.sha256(json.dumps([body, sample], sort_keys=True).encode()).hexdigest(), body


def request_fields(text: str, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Merge the JSON object of --request into `defaults`; null removes a default.

    Raises:
        InputError: the text is not a JSON object, or has a field that the client sets.
    """
    try:
        more = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"--request is not JSON: {error}") from None
    if not isinstance(more, dict):
        raise InputError("--request is not a JSON object")
    if taken := {"model", "messages", "stream", "n", "response_format"} & more.keys():
        raise InputError(f'--request may not set "{min(taken)}"')
    return {name: value for name, value in {**defaults, **more}.items() if value is not None}


def estimate(body: Mapping[str, Any]) -> int:
    """Estimate the tokens of a request and its answer, before the call or if the endpoint reports no usage."""
    limit = body.get("max_completion_tokens", body.get("max_tokens"))
    total = limit if isinstance(limit, int) else ANSWER_TOKENS
    for message in body["messages"]:
        parts = message["content"]
        for part in [{"type": "text", "text": parts}] if isinstance(parts, str) else parts:
            if part["type"] == "text":
                total += len(part["text"].encode(errors="replace")) // 3 + 8
            elif part["type"] == "input_audio":
                total += len(part["input_audio"]["data"]) // AUDIO_BYTES + 8
            else:
                total += IMAGE_TOKENS
    return total

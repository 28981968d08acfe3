"""Answers of the captioning engine, which runs in a thread for as long as the server does."""

import asyncio
import secrets
import threading
import zlib
from collections import deque
from collections.abc import AsyncGenerator, Iterator
from contextlib import suppress
from typing import Any

from avocado_jax.data.media import Media
from avocado_jax.data.prompt import conversation_prompt
from avocado_jax.data.rows import Row, make_row, text_row
from avocado_jax.errors import InputError
from avocado_jax.sampling.captioner import Captioner, clip_warnings, words
from avocado_jax.sampling.engine import Engine
from avocado_jax.sampling.logits import Sampling
from avocado_jax.serving.protocol import Answer, ApiError, Chat
from avocado_jax.typing import Array, Int

CHARACTERS = 32  # of a token, at most on average: longer texts are not tokenized
SAMPLINGS = 8  # combinations of temperature, top-p and top-k: each one is compiled


class _Job:
    """A request of the engine. The engine's thread writes, the event loop reads."""

    def __init__(self, row: Row, sampling: Sampling, number: int, limit: int, stream: bool) -> None:
        self.row: Row | None = row
        self.sampling, self.number, self.limit, self.stream = sampling, number, limit, stream
        self.cancelled, self.sent = False, 0
        self._news: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, news: tuple[Int[Array, "N"], bool] | Exception) -> None:
        """Pass on the tokens so far and whether they are all, or an error."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    async def get(self) -> tuple[Int[Array, "N"], bool]:
        """The next tokens. Raises the error."""
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        return news


class EngineBackend:
    """Answers chats about clips.

    Requests of one way of sampling are decoded together; those of another one wait until these have finished.

    Args:
        length: maximum number of tokens of an answer.
        prompt_tokens: maximum number of tokens of a prompt with its media.
        sampling: of requests that state none.
        seed, slots, cache_bytes: as for `Engine`.

    Attributes:
        failed: is set, and `error` states why, once the devices have failed and no request can be answered.
    """

    def __init__(
        self,
        captioner: Captioner,
        length: int,
        prompt_tokens: int,
        sampling: Sampling,
        seed: int = 0,
        slots: int | None = None,
        cache_bytes: int | None = None,
    ) -> None:
        self._captioner, self._length, self._prompt_tokens = captioner, length, prompt_tokens
        self._sampling = sampling
        self._samplings = {sampling if sampling.temperature else Sampling(0.0)}  # the default has a place
        self._options = dict(seed=seed, slots=slots, cache_bytes=cache_bytes, drop=self._drop)
        self._jobs: set[_Job] = set()  # that are not finished
        self._waiting: deque[_Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self.failed, self.error = asyncio.Event(), None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Call this in the event loop that `answers` is used in."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self, seconds: float) -> bool:
        """Drop what is not finished. Returns whether the thread has ended in time."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.cancelled = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def prepare(self, chat: Chat, media: Media | None) -> tuple["_Job", list[str]]:
        """The features of a clip and its prompt, and warnings. Raises ApiError if they are too large."""
        row = await asyncio.to_thread(self._row, chat, media)
        sampling = self._sampling_of(chat)  # last: a request that is refused takes no place
        limit = min(chat.limit or self._length, self._length)
        seed = chat.request.seed
        number = secrets.randbits(31) if seed is None else zlib.crc32(str(seed).encode()) >> 1
        warnings = clip_warnings(media, row, self._captioner.reading) if media else []
        return _Job(row, sampling, number, limit, chat.request.stream), warnings

    async def answers(self, job: "_Job") -> AsyncGenerator[Answer, None]:
        """The answer so far, each time that it has grown (for streams), and in the end the complete one.

        Closing the generator drops the request: its slot is free after the next dispatch.

        Raises:
            ApiError: the devices cannot answer it.
        """
        prompt = len(job.row.prompt_ids)
        with self._changed:
            if self._closed or self.error:
                raise ApiError(503, "the server is stopping")
            self._jobs.add(job)
            self._waiting.append(job)
            self._changed.notify_all()
        try:
            complete = False
            while not complete:
                tokens, complete = await job.get()
                truncated = complete and int(tokens[-1]) not in self._captioner.stops
                yield Answer(words(self._captioner, tokens), len(tokens), truncated, prompt, complete)
        finally:
            job.cancelled = True
            with self._changed:
                self._jobs.discard(job)

    def _sampling_of(self, chat: Chat) -> Sampling:
        """How the tokens of a request are drawn."""
        request, default = chat.request, self._sampling
        temperature = default.temperature if request.temperature is None else request.temperature
        top_k = default.top_k if request.top_k is None else request.top_k
        top_p = default.top_p if request.top_p is None else request.top_p
        try:  # with temperature 0 the others change nothing
            requested = Sampling(temperature, top_k, top_p) if temperature else Sampling(0.0)
        except ValueError as error:
            raise ApiError(400, str(error), param="temperature") from None
        if requested not in self._samplings and len(self._samplings) == SAMPLINGS:
            raise ApiError(
                400,
                f"this server has compiled {SAMPLINGS} combinations of temperature, top_p and top_k, its limit",
                param="temperature",
            )
        self._samplings.add(requested)
        return requested

    def _row(self, chat: Chat, media: Media | None) -> Row:
        captioner, most = self._captioner, self._prompt_tokens
        if sum(len(turn.text) + len(turn.after or "") for turn in chat.turns) > CHARACTERS * most:
            raise ApiError(400, f"the text has more than {most} tokens", "context_length_exceeded")
        prompt = conversation_prompt(captioner.tokenizer, chat.turns)
        if media is None:
            row = text_row([*prompt.before, *prompt.after])
        else:
            try:
                row = make_row(media, prompt, captioner.config, captioner.reading)
            except InputError as error:
                raise ApiError(400, str(error)) from error
        if (tokens := len(row.prompt_ids)) > most:
            message = f"the prompt has {tokens} tokens with its media; {most} are the most (--max-prompt-tokens)"
            raise ApiError(400, message, "context_length_exceeded")
        return row

    def _run(self) -> None:
        """Caption until closed: one engine after the other, each for the oldest request's way of sampling."""
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._closed or self._waiting)
                    if self._closed:
                        return
                    sampling = self._waiting[0].sampling
                engine = Engine(self._captioner, self._length, sampling, **self._options)
                for job, tokens in engine.run(self._requests(sampling)):
                    job.put(_error(tokens) if isinstance(tokens, Exception) else (tokens[: job.limit], True))
        except BaseException as error:
            with self._changed:
                self.error = error
                jobs = list(self._jobs)
            for job in jobs:
                job.put(ApiError(500, "the devices have failed"))
            with suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self.failed.set)

    def _requests(self, sampling: Sampling) -> Iterator[tuple[_Job, Row, int]]:
        """The waiting requests, and those that arrive, until one has another way of sampling."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed or self._waiting[0].sampling != sampling:
                    return
                job = self._waiting.popleft()
                row, job.row = job.row, None
            if not job.cancelled:
                yield job, row, job.number
            del job, row  # they are not kept while this waits

    def _drop(self, job: _Job, tokens: Int[Array, "N"]) -> bool:
        """Whether an unfinished answer ends here. Called in the engine's thread after each dispatch."""
        if job.cancelled:
            return True
        if len(tokens) >= job.limit:
            job.put((tokens[: job.limit].copy(), True))
            return True
        if job.stream and len(tokens) > job.sent:
            job.sent = len(tokens)
            job.put((tokens.copy(), False))
        return False


def _error(error: Exception) -> ApiError:
    """An error of one clip: a request of its shape fails again."""
    return ApiError(400, f"the devices have too little memory for this clip ({type(error).__name__})", "clip_too_large")

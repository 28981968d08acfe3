"""The backend that answers chats with the captioning engine, which runs in a thread."""

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

CHARACTERS = 32  # assumed maximum per token on average: longer texts are refused without tokenizing them
SAMPLINGS = 8  # maximum combinations of temperature, top-p and top-k, since each is compiled


class _Job:
    """A request. The engine's thread puts results, the event loop gets them."""

    def __init__(self, row: Row, sampling: Sampling, number: int, limit: int, stream: bool) -> None:
        self.row: Row | None = row
        self.sampling, self.number, self.limit, self.stream = sampling, number, limit, stream
        self.cancelled, self.sent = False, 0
        self._news: asyncio.Queue[Any] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()

    def put(self, news: tuple[Int[Array, "N"], bool] | Exception) -> None:
        """Send (tokens so far, whether complete), or an error."""
        with suppress(RuntimeError):  # the loop is closed, so nothing waits for the result
            self._loop.call_soon_threadsafe(self._news.put_nowait, news)

    async def get(self) -> tuple[Int[Array, "N"], bool]:
        """Receive the next (tokens, complete). Raises the error if one was sent."""
        news = await self._news.get()
        if isinstance(news, Exception):
            raise news
        return news


class EngineBackend:
    """Answers chats about clips with the engine.

    Requests with the same sampling settings are decoded together; others wait until these have finished.

    Args:
        length: maximum tokens of an answer.
        prompt_tokens: maximum tokens of a prompt with its media.
        sampling: default sampling settings.
        seed, slots, cache_bytes: as for `Engine`.

    Attributes:
        failed: set after a failure of the devices; `error` is the exception.
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
        self._samplings = {sampling if sampling.temperature else Sampling(0.0)}  # the default is always allowed
        self._options = dict(seed=seed, slots=slots, cache_bytes=cache_bytes, drop=self._drop)
        self._jobs: set[_Job] = set()  # unfinished requests
        self._waiting: deque[_Job] = deque()
        self._changed, self._closed = threading.Condition(), False
        self.failed, self.error = asyncio.Event(), None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Must be called in the event loop that uses `answers`."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self, seconds: float) -> bool:
        """Drop unfinished requests. Returns whether the thread ended in time."""
        with self._changed:
            self._closed = True
            for job in self._jobs:
                job.cancelled = True
            self._changed.notify_all()
        self._thread.join(seconds)
        return not self._thread.is_alive()

    async def prepare(self, chat: Chat, media: Media | None) -> tuple["_Job", list[str]]:
        """Compute the features of clip and prompt; return the job and warnings. Raises ApiError if too large."""
        row = await asyncio.to_thread(self._row, chat, media)
        sampling = self._sampling_of(chat)  # last: a refused request must not use one of the SAMPLINGS combinations
        limit = min(chat.limit or self._length, self._length)
        seed = chat.request.seed
        number = secrets.randbits(31) if seed is None else zlib.crc32(str(seed).encode()) >> 1
        warnings = clip_warnings(media, row, self._captioner.reading) if media else []
        return _Job(row, sampling, number, limit, chat.request.stream), warnings

    async def answers(self, job: "_Job") -> AsyncGenerator[Answer, None]:
        """Yield partial answers (for streams) as they grow, and finally the complete one.

        Closing the generator drops the request; its slot is freed after the next dispatch.

        Raises:
            ApiError: the clip does not fit in memory, the devices failed, or the server is stopping.
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
        """The sampling settings of a request."""
        request, default = chat.request, self._sampling
        temperature = default.temperature if request.temperature is None else request.temperature
        top_k = default.top_k if request.top_k is None else request.top_k
        top_p = default.top_p if request.top_p is None else request.top_p
        try:  # with temperature 0 the other settings have no effect
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
            message = f"the prompt has {tokens} tokens with its media; the maximum is {most} (--max-prompt-tokens)"
            raise ApiError(400, message, "context_length_exceeded")
        return row

    def _run(self) -> None:
        """Answer requests until closed. Each engine uses the sampling settings of the oldest waiting request."""
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
        """Yield waiting and arriving requests, up to the first one with other sampling settings."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._waiting)
                if self._closed or self._waiting[0].sampling != sampling:
                    return
                job = self._waiting.popleft()
                row, job.row = job.row, None
            if not job.cancelled:
                yield job, row, job.number
            del job, row  # free their memory while waiting

    def _drop(self, job: _Job, tokens: Int[Array, "N"]) -> bool:
        """Whether to end an unfinished answer. Called in the engine's thread after each dispatch."""
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
    """The error of a single clip. It is permanent: a clip of this shape fails again."""
    return ApiError(400, f"the devices have too little memory for this clip ({type(error).__name__})", "clip_too_large")

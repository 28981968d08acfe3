"""The HTTP application: routes, limits, errors, streams."""

import asyncio
import hmac
import json
import tempfile
import time
import traceback
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from typing import IO, Any, Protocol, TypeVar

from aiohttp import web

from avocado_jax.data.container import printable
from avocado_jax.data.media import Media, Reading
from avocado_jax.data.prompt import Habits
from avocado_jax.data.reader import ClipReader
from avocado_jax.errors import InputError
from avocado_jax.serving.metrics import Metrics
from avocado_jax.serving.protocol import Answer, ApiError, Chat, Replies, parse_chat
from avocado_jax.serving.sources import Sources, is_remote

T = TypeVar("T")
PARSED_AT_ONCE = 2  # bodies parsed at the same time, since parsing takes a multiple of their size in memory
MEMORY_BYTES = 2**20  # larger bodies are spooled to disk
BODY_SECONDS = 60.0  # timeout for receiving a body
DISCONNECTED = 499
OPEN_PATHS = ("/health", "/metrics")  # do not require the API key


class Backend(Protocol):
    """Answers chat requests. Both methods raise ApiError."""

    failed: asyncio.Event  # set after a permanent failure

    async def prepare(self, chat: Chat, media: Media | None) -> tuple[Any, list[str]]:
        """Validate a chat; return the input of `answers`, and warnings about the clip."""
        ...

    def answers(self, prepared: Any) -> AsyncGenerator[Answer, None]:
        """Yield partial answers (for streams) as they grow, and finally the complete one."""
        ...


@dataclass(frozen=True)
class Limits:
    """The limits of a server.

    Attributes:
        requests: maximum concurrent requests, waiting ones included; further ones are refused with status 429.
        body_bytes: maximum size of a request.
        seconds: timeout of a request.
        clip_seconds: maximum duration of a clip.
    """

    requests: int = 64
    body_bytes: int = 64 * 2**20
    seconds: float = 600.0
    clip_seconds: float = 600.0


class Server:
    """The server of one model.

    Args:
        name: model name.
        reader: decodes clips in subprocesses.
        reading: how frames and sound are sampled.
        habits: default question and system message of the checkpoint.
        key: required API key; None: no key is required.
        hosts: allowed Host names; None: any. This protects a local server without a key from DNS rebinding.
    """

    def __init__(
        self,
        backend: Backend,
        name: str,
        reader: ClipReader,
        reading: Reading,
        habits: Habits,
        sources: Sources,
        limits: Limits = Limits(),
        key: str | None = None,
        hosts: frozenset[str] | None = None,
    ) -> None:
        self.backend, self.name, self.limits, self.metrics = backend, name, limits, Metrics()
        self._reader, self._reading, self._habits, self._sources = reader, reading, habits, sources
        self._key, self._hosts = key.encode() if key else None, hosts
        self._active: set[asyncio.Timeout] = set()  # deadlines of the requests in flight
        self._parsing = asyncio.Semaphore(PARSED_AT_ONCE)
        self._created, self._stopping = int(time.time()), False

    def application(self) -> web.Application:
        """The aiohttp application."""
        app = web.Application(middlewares=[self._errors])
        app.add_routes(
            [
                web.get("/health", self._health),
                web.get("/metrics", self._metrics),
                web.get("/v1/models", self._models),
                web.get("/v1/models/{name:.+}", self._model),
                web.post("/v1/chat/completions", self._chat),
            ]
        )
        return app

    def stop(self) -> None:
        """End the requests in flight with status 503."""
        self._stopping = True
        self._reader.close()
        for deadline in self._active:
            if not deadline.expired():
                deadline.reschedule(asyncio.get_running_loop().time())

    @web.middleware
    async def _errors(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Check host and key, and convert all errors to the protocol's format."""
        try:
            if self._hosts is not None and request.url.host not in self._hosts:
                raise ApiError(403, "the Host of the request is not this server")
            if self._key and request.path not in OPEN_PATHS:
                given = request.headers.get("Authorization", "").encode(errors="surrogateescape")
                if not hmac.compare_digest(given, b"Bearer " + self._key):
                    raise ApiError(401, "the API key is missing or wrong", "invalid_api_key")
            return await handler(request)
        except ApiError as error:
            return _error_response(error)
        except web.HTTPException as error:  # raised by the router
            return _error_response(ApiError(error.status, f"{request.method} {request.path}: {error.reason}"))

    async def _health(self, _: web.Request) -> web.Response:
        if self.backend.failed.is_set():
            raise ApiError(503, "the devices have failed")
        return web.json_response({"status": "ok"})

    async def _metrics(self, _: web.Request) -> web.Response:
        text = self.metrics.text(len(self._active))
        return web.Response(text=text, headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})

    async def _models(self, _: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [self._described()]})

    async def _model(self, request: web.Request) -> web.Response:
        self._check_model(request.match_info["name"])
        return web.json_response(self._described())

    def _described(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": self._created, "owned_by": "avocado_jax"}

    def _check_model(self, name: str) -> None:
        if name != self.name:
            raise ApiError(404, f"no model {name!r}; this server has {self.name!r}", "model_not_found", "model")

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        begun, status = time.monotonic(), DISCONNECTED
        try:
            response = await self._admit(request)
            status = response.get("status", response.status)
            return response
        except ApiError as error:
            status = error.status
            raise
        finally:  # the handler is cancelled if the client disconnects
            self.metrics.finished(status, time.monotonic() - begun)

    async def _admit(self, request: web.Request) -> web.StreamResponse:
        """Answer a chat within the limits of concurrency and time."""
        if len(self._active) >= self.limits.requests:
            raise ApiError(429, f"{self.limits.requests} requests are being answered; try again", "queue_full")
        stream = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        deadline = asyncio.timeout(self.limits.seconds)
        self._active.add(deadline)
        try:
            async with deadline:
                return await self._answer(request, stream)
        except ConnectionError:
            raise
        except Exception as raised:
            error = self._error_of(raised)
        finally:
            self._active.discard(deadline)
        if not stream.prepared:
            raise error
        stream["status"] = error.status  # for the metrics; the client already received status 200
        await _send(stream, error.body())
        await stream.write_eof()
        return stream

    async def _answer(self, request: web.Request, stream: web.StreamResponse) -> web.StreamResponse:
        """Answer a chat, streaming if requested. A stream starts with the first tokens."""
        chat, prepared, warnings = await self._receive_chat(request)
        replies, sent, answer = Replies(uuid.uuid4().hex, self.name, warnings), "", Answer("", 0)
        async with aclosing(self.backend.answers(prepared)) as answers:
            async for answer in answers:
                if not chat.request.stream:
                    continue
                if not stream.prepared:
                    await stream.prepare(request)
                    await _send(stream, replies.chunk({"role": "assistant", "content": ""}))
                if new := grown(answer, sent):
                    sent += new
                    await _send(stream, replies.chunk({"content": new}))
        self.metrics.prompt_tokens += answer.prompt_tokens
        self.metrics.completion_tokens += answer.tokens
        if not chat.request.stream:
            return web.json_response(replies.completion(answer))
        await _send(stream, replies.chunk({}, answer))
        if chat.request.stream_options and chat.request.stream_options.include_usage:
            await _send(stream, replies.usage(answer))
        await stream.write(b"data: [DONE]\n\n")
        await stream.write_eof()
        return stream

    def _error_of(self, raised: Exception) -> ApiError:
        """The error for the client, without its traceback, whose frames would keep clips in memory."""
        if isinstance(raised, ApiError):
            return raised.with_traceback(None)
        if isinstance(raised, TimeoutError):
            late = ApiError(504, f"no answer within {self.limits.seconds:g} s", "timeout")
            return ApiError(503, "the server is stopping") if self._stopping else late
        traceback.print_exception(raised)
        return ApiError(500, "internal error")

    async def _receive_chat(self, request: web.Request) -> tuple[Chat, Any, list[str]]:
        """Receive a chat; return it, the prepared input of the backend, and warnings about the clip."""
        async with AsyncExitStack() as files:
            with tempfile.SpooledTemporaryFile(MEMORY_BYTES) as body:
                await self._receive(request, body)
                async with self._parsing:
                    chat = await asyncio.to_thread(self._parse, body)
                    paths = await self._open(chat.urls, False, files)
                    video, sound = bool(chat.video), bool(chat.sound)
                    chat = chat._replace(video=None, images=(), sound=None)  # data URLs are large
            paths = await self._open(paths, True, files)
            media = await _complete(asyncio.to_thread(self._read, paths, video, sound)) if paths else None
        return chat, *await self.backend.prepare(chat, media)

    async def _receive(self, request: web.Request, body: IO[bytes]) -> None:
        """Write the body of a request to a file."""
        if request.content_type != "application/json":  # browsers cannot send it cross-origin without a preflight
            raise ApiError(415, "Content-Type must be application/json")
        limit, size = self.limits.body_bytes, request.content_length or 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                if size <= limit:
                    size = 0
                    async for part in request.content.iter_any():
                        size += len(part)
                        if size > limit:
                            break
                        body.write(part)
        except TimeoutError:
            raise ApiError(408, f"the request did not arrive within {BODY_SECONDS:g} s") from None
        if size > limit:
            raise ApiError(413, f"the request has more than {limit} bytes", "request_too_large")
        body.seek(0)

    def _parse(self, body: IO[bytes]) -> Chat:
        chat = parse_chat(body.read(), self._habits.prompt, self._habits.system, self._habits.media_first)
        self._check_model(chat.request.model)
        if len(chat.images) > self._reading.most_frames:
            raise ApiError(400, f"more than {self._reading.most_frames} images")
        return chat

    async def _open(self, urls: list[str], remote: bool, files: AsyncExitStack) -> list[str]:
        """Open the remote or the other URLs and replace them by the paths of the open files."""
        return [
            await files.enter_async_context(self._sources.open(url)) if is_remote(url) == remote else url
            for url in urls
        ]

    def _read(self, paths: list[str], video: bool, sound: bool) -> Media:
        """Decode a clip in a subprocess."""
        try:
            if not video:
                pictures = paths[: len(paths) - sound]
                media = self._reader.read_parts(pictures, paths[-1] if sound else None, self._reading)
                self._check_length(media.seconds)
                return media
            self._check_length(self._reader.probe(paths[0], self._reading).seconds)
            return self._reader.read(paths[0], self._reading)
        except InputError as error:
            message = str(error)
            for path in sorted(paths, key=len, reverse=True):  # a path can be a prefix of another
                message = message.replace(printable(path), "the clip")
            raise ApiError(400, message, "invalid_clip") from None

    def _check_length(self, seconds: float) -> None:
        limit = self.limits.clip_seconds
        if seconds > limit:
            raise ApiError(400, f"the clip is {seconds:.0f} s long; the limit is {limit:g} s", "clip_too_long")


def grown(answer: Answer, sent: str) -> str:
    """The text of an answer after `sent`. Incomplete UTF-8 characters are withheld."""
    text = answer.text if answer.complete else answer.text.rstrip("\ufffd").rstrip()
    return text[len(sent) :] if text.startswith(sent) or answer.complete else ""


async def _complete(work: Coroutine[Any, Any, T]) -> T:
    """Await work that uses open files, even when cancelled: its thread cannot be interrupted."""
    task = asyncio.ensure_future(work)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        with suppress(Exception):
            await task
        raise


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


def _error_response(error: ApiError) -> web.Response:
    headers = {"Retry-After": "1"} if error.status in (429, 503) else None
    return web.json_response(error.body(), status=error.status, headers=headers)

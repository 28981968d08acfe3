"""The OpenAI chat protocol: validation of requests, and bodies of answers and errors."""

import math
import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from avocado_jax.data.prompt import Turn

MOST_MESSAGES = 64
MOST_COMMAS = 200_000  # maximum of a body: bounds the memory of its JSON values (base64 has no commas)
SYSTEM_ROLES = ("system", "developer")
TYPES = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An error for the client: HTTP status and message."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The error as a JSON body."""
        kind = TYPES.get(self.status) or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class Url(_Model):
    """A data, file, http or https URL."""

    url: str


class Sound(_Model):
    """A base64 sound file."""

    data: str
    format: Literal["wav", "mp3"]


class TextPart(_Model):
    """Text of a message."""

    type: Literal["text"]
    text: str


class VideoPart(_Model):
    """A clip."""

    type: Literal["video_url"]
    video_url: Url


class ImagePart(_Model):
    """A frame of a clip."""

    type: Literal["image_url"]
    image_url: Url


class SoundPart(_Model):
    """The sound of a clip."""

    type: Literal["input_audio"]
    input_audio: Sound


Part = Annotated[TextPart | VideoPart | ImagePart | SoundPart, Field(discriminator="type")]


class Message(_Model):
    """A message of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    def parts(self) -> list[Any]:
        """The content as a list of parts."""
        return [TextPart(type="text", text=self.content)] if isinstance(self.content, str) else self.content


class StreamOptions(_Model):
    """Options of a stream."""

    include_usage: bool = False


class ChatRequest(_Model):
    """The body of a request. Unknown fields are ignored."""

    model: str
    messages: list[Message] = Field(min_length=1, max_length=MOST_MESSAGES)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=0)
    seed: int | None = None
    # Not supported: accepted only with a neutral value.
    n: Any = None
    stop: Any = None
    tools: Any = None
    functions: Any = None
    logprobs: Any = None
    logit_bias: Any = None
    response_format: Any = None
    frequency_penalty: Any = None
    presence_penalty: Any = None


NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (None, 1),
    "stop": (None, [], ""),
    "tools": (None, []),
    "functions": (None, []),
    "logprobs": (None, False),
    "logit_bias": (None, {}),
    "response_format": (None, {"type": "text"}),
    "frequency_penalty": (None, 0),
    "presence_penalty": (None, 0),
}


class Chat(NamedTuple):
    """A validated request; its media are not loaded.

    Attributes:
        turns: the messages; at most one has media.
        video: URL of the clip, if given as a video.
        images: URLs of the frames, if the clip is given in parts.
        sound: data URL of the sound, if the clip is given in parts.
        limit: maximum tokens of the answer; None: the server's limit.
        request: the other fields of the request.
    """

    turns: tuple[Turn, ...]
    video: str | None
    images: tuple[str, ...]
    sound: str | None
    limit: int | None
    request: ChatRequest

    @property
    def urls(self) -> list[str]:
        """The URLs of the media: the video, or the frames and the sound."""
        return [url for url in (self.video, *self.images, self.sound) if url is not None]


def parse_chat(body: bytes, question: str, system: str, media_first: bool = True) -> Chat:
    """Validate the body of a request.

    Args:
        question: default text of a user message that has media only.
        system: default system message. An empty system message is removed, here and in a request.
        media_first: whether `question` follows the media or precedes them.

    Raises:
        ApiError: the request is invalid or not supported.
    """
    if body.count(b",") > MOST_COMMAS:
        raise ApiError(400, "the request has too many parts")
    try:
        request = ChatRequest.model_validate_json(body)
    except ValidationError as error:
        found = error.errors(include_input=False, include_url=False)
        first = max(found, key=lambda entry: len(entry["loc"]))  # the deepest: of the best match in a union
        field = ".".join(str(part) for part in first["loc"] if "[" not in str(part))  # without type names
        raise ApiError(400, f"{field}: {first['msg']}" if field else first["msg"], param=field or None) from None
    for name, values in NEUTRAL.items():
        if getattr(request, name) not in values:
            raise ApiError(400, f"{name} is not supported", "unsupported_parameter", name)
    parts = [part for message in request.messages for part in message.parts()]
    videos = [part.video_url.url for part in parts if isinstance(part, VideoPart)]
    images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    sounds = [part.input_audio.data for part in parts if isinstance(part, SoundPart)]
    if len(videos) > 1 or len(sounds) > 1 or (videos and (images or sounds)):
        raise ApiError(400, "one clip a request: one video_url, or image_url parts (its frames) and one input_audio")
    limits = [limit for limit in (request.max_completion_tokens, request.max_tokens) if limit is not None]
    return Chat(
        tuple(turn for turn in _turns(request, question, system, media_first) if turn.role != "system" or turn.text),
        videos[0] if videos else None,
        tuple(images),
        f"data:;base64,{sounds[0]}" if sounds else None,
        min(limits) if limits else None,
        request.model_copy(update={"messages": []}),
    )


def _turns(request: ChatRequest, question: str, system: str, media_first: bool) -> Iterator[Turn]:
    """Convert messages to turns. All media are at the position of the first; text parts are joined by newlines."""
    if not any(message.role in SYSTEM_ROLES for message in request.messages):
        yield Turn("system", system)
    placed = False
    for number, message in enumerate(request.messages):
        parts = message.parts()
        texts: list[list[str]] = [[], []]
        first = next((index for index, part in enumerate(parts) if not isinstance(part, TextPart)), None)
        if first is not None and (message.role != "user" or placed):
            field = f"messages.{number}"
            raise ApiError(400, f"{field}: media must be in one user message", param=field)
        for index, part in enumerate(parts):
            if isinstance(part, TextPart):
                texts[first is not None and index > first].append(part.text)
        before, after = ("\n".join(lines) for lines in texts)
        if first is None:
            yield Turn("system" if message.role in SYSTEM_ROLES else message.role, before)
        else:
            placed = True
            if not (before or after):
                before, after = ("", question) if media_first else (question, "")
            yield Turn("user", before, after)
    if request.messages[-1].role != "user":
        raise ApiError(400, "the last message must be the user's", param="messages")


class Answer(NamedTuple):
    """A complete or partial answer of the model."""

    text: str
    tokens: int
    truncated: bool = False  # ended by the token limit
    prompt_tokens: int = 0
    complete: bool = False


class Replies:
    """Builds the response bodies of a request."""

    def __init__(self, number: str, model: str, warnings: Sequence[str] = ()) -> None:
        self._fields = {"id": f"chatcmpl-{number}", "created": math.floor(time.time()), "model": model}
        self._warnings = {"warnings": list(warnings)} if warnings else {}

    def completion(self, answer: Answer) -> dict[str, Any]:
        """A complete answer."""
        message = {"role": "assistant", "content": answer.text}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": _finish(answer)}
        fields = {"choices": [choice], "usage": _usage(answer)}
        return {**self._fields, "object": "chat.completion", **fields, **self._warnings}

    def chunk(self, delta: dict[str, str], finished: Answer | None = None) -> dict[str, Any]:
        """A chunk of a stream."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finished and _finish(finished)}
        return {**self._fields, "object": "chat.completion.chunk", "choices": [choice], **self._warnings}

    def usage(self, answer: Answer) -> dict[str, Any]:
        """The last chunk of a stream, with the token usage."""
        return {**self._fields, "object": "chat.completion.chunk", "choices": [], "usage": _usage(answer)}


def _finish(answer: Answer) -> str:
    return "length" if answer.truncated else "stop"


def _usage(answer: Answer) -> dict[str, int]:
    total = answer.prompt_tokens + answer.tokens
    return {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.tokens, "total_tokens": total}

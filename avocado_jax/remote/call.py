"""One HTTP call: the text of the answer, or an error that states whether a retry may help."""

import json
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

ANSWER_BYTES = 2**20  # maximum size of an answer
TRUNCATED = ("length", "content_filter")  # finish reasons of an incomplete answer


class Malformed(ValueError):
    """An invalid answer. `text`: the model's output, if any."""

    def __init__(self, what: str, text: str = ""):
        super().__init__(what)
        self.text = text


class Passing(Exception):
    """A transient error. `wait`: seconds until the server accepts a retry."""

    def __init__(self, what: str, wait: float = 0.0, late: bool = False):
        super().__init__(what)
        self.wait = wait
        self.late = late  # the server received the request and may have processed it


class Final(Exception):
    """A permanent error. `status`: the HTTP status, 0 if none."""

    def __init__(self, what: str, status: int = 0):
        super().__init__(what)
        self.status = status


def proxy_for(url: str) -> str | None:
    """The proxy for a URL by HTTP_PROXY, HTTPS_PROXY and NO_PROXY; None for loopback addresses.

    aiohttp's `trust_env` is not used: it also reads the netrc file, which would replace the API key.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    return getproxies().get(parts.scheme)


async def call(session: aiohttp.ClientSession, url: str, body: dict[str, Any], timeout: float) -> bytes:
    """Post a request and return the body of the answer.

    Raises:
        Passing, Final, Malformed: no answer.
    """
    try:
        async with session.post(
            url, json=body, allow_redirects=False, timeout=aiohttp.ClientTimeout(total=timeout)
        ) as response:
            raw = bytearray()
            async for part in response.content.iter_any():
                raw += part
                if len(raw) > ANSWER_BYTES:
                    raise Malformed(f"an answer of more than {ANSWER_BYTES} bytes")
    except TimeoutError:
        raise Passing(f"no answer within {timeout:g} s", late=True) from None
    except (aiohttp.ClientError, OSError) as error:
        raise Passing(f"{type(error).__name__}: {error}") from None
    if response.status == 200:
        return bytes(raw)
    detail = " ".join(raw[:300].decode(errors="replace").split())
    what = f"{url}: {response.status} {response.reason}: {detail}"
    if response.status in (408, 409, 425, 429) or response.status >= 500:
        raise Passing(what, retry_after(response.headers.get("Retry-After", "")))
    raise Final(what, response.status)


def content(raw: bytes) -> str:
    """The text of a chat completion.

    Raises:
        Malformed: the answer is invalid, or the server reports it as incomplete.
    """
    try:
        choice = json.loads(raw)["choices"][0]
        text, ended = choice["message"]["content"], choice.get("finish_reason")
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise Malformed(f"not an answer of the chat protocol: {raw[:200]!r}") from None
    if not isinstance(text, str):
        raise Malformed(f"the answer holds no text but {type(text).__name__}")
    if ended in TRUNCATED:
        raise Malformed(f"the answer was truncated ({ended}) after {text[-80:]!r}", text)
    return text


def usage(raw: bytes) -> int | None:
    """The reported tokens of prompt and answer; None if not reported."""
    try:
        total = json.loads(raw)["usage"]["total_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return total if type(total) is int and total >= 0 else None


def model_of(raw: bytes) -> str:
    """The reported name of the model; empty if not reported."""
    try:
        name = json.loads(raw)["model"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return name if isinstance(name, str) else ""


def retry_after(header: str) -> float:
    """Seconds of a Retry-After header, a number or a date; 0 if it is invalid."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (ValueError, TypeError):
        return 0.0

"""One call over HTTP: the text of the answer, or an error that states whether a retry may help."""

import json
from email.utils import parsedate_to_datetime
from time import time
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp

ANSWER_BYTES = 2**20  # a longer answer is not read on
TRUNCATED = ("length", "content_filter")  # finish reasons of an incomplete answer


class Malformed(ValueError):
    """An invalid answer. `text` is the model's output, if there is any."""

    def __init__(self, what: str, text: str = ""):
        super().__init__(what)
        self.text = text


class Passing(Exception):
    """An error that may pass, and the seconds that the server asks to wait."""

    def __init__(self, what: str, wait: float = 0.0, late: bool = False):
        super().__init__(what)
        self.wait = wait
        self.late = late  # the server had the question, and may have worked on it


class Final(Exception):
    """An error that asking again does not change, and its status, if a server gave one."""

    def __init__(self, what: str, status: int = 0):
        super().__init__(what)
        self.status = status


def proxy_for(url: str) -> str | None:
    """The proxy for a URL by HTTP_PROXY, HTTPS_PROXY and NO_PROXY; none for this machine's loopback addresses.

    The netrc file, which aiohttp's `trust_env` would read too, is ignored: it would replace the API key.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    if host in ("localhost", "::1") or host.startswith("127.") or proxy_bypass(host):
        return None
    return getproxies().get(parts.scheme)


async def call(session: aiohttp.ClientSession, url: str, body: dict[str, Any], timeout: float) -> bytes:
    """Post one request and return the body of the answer.

    Raises:
        Passing, Final, Malformed: there is none.
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
    """The text in an answer of the chat protocol.

    Raises:
        Malformed: it is not a valid answer, or the server reports it as incomplete.
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
    """The tokens that an answer says it took, question included; None if it does not say."""
    try:
        total = json.loads(raw)["usage"]["total_tokens"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return total if type(total) is int and total >= 0 else None


def model_of(raw: bytes) -> str:
    """The model that answered, as the endpoint names it; empty if it does not say."""
    try:
        name = json.loads(raw)["model"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return ""
    return name if isinstance(name, str) else ""


def retry_after(header: str) -> float:
    """Seconds of a Retry-After header: a number, or a date; 0 if it is neither."""
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time())
    except (ValueError, TypeError):
        return 0.0

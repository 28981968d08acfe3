"""Download clips from URLs in requests: from public addresses only, with limits of size and time."""

import asyncio
import errno
import ipaddress
import socket
from typing import IO, Any
from urllib.parse import urljoin

import aiohttp

from avocado_jax.errors import first_line
from avocado_jax.serving.protocol import ApiError

REDIRECTS = 3
REDIRECT_STATUSES = (301, 302, 303, 307, 308)


def is_public(address: str) -> bool:
    """Whether an IP address is public; an IPv4 address embedded in an IPv6 address must be public too."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv6Address):
        embedded = found.ipv4_mapped or found.sixtofour or (found.teredo and found.teredo[1])
        if not embedded and found in ipaddress.ip_network("64:ff9b::/96"):  # NAT64
            embedded = ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if embedded and not is_public(str(embedded)):
            return False
    return found.is_global and not (found.is_multicast or found.is_reserved or found.is_unspecified)


def _public_socket(info: tuple[Any, ...]) -> socket.socket:
    """Create a socket for a connection to a public address.

    The address is checked after name resolution, so that the name cannot resolve to another address later.
    """
    family, kind, protocol, _, address = info
    if not is_public(address[0]):
        raise _Refused
    made = socket.socket(family, kind, protocol)
    made.setblocking(False)
    return made


class _Refused(OSError):
    """A private address. An OSError, so that the other addresses of a name are tried."""

    def __init__(self) -> None:
        super().__init__(errno.EACCES, "the address is not public")


async def download(url: str, file: IO[bytes], limit: int, seconds: float) -> None:
    """Download a URL into a file.

    Raises:
        ApiError: the address is not public, the status is not 200, or a limit is exceeded.
    """
    # No proxies of the environment, no cookies. No decompression, so that `limit` is the size on disk.
    connector = aiohttp.TCPConnector(socket_factory=_public_socket, use_dns_cache=False, force_close=True)
    options = dict(cookie_jar=aiohttp.DummyCookieJar(), headers={"Accept-Encoding": "identity"}, auto_decompress=False)
    try:
        async with asyncio.timeout(seconds), aiohttp.ClientSession(connector=connector, **options) as session:
            for _ in range(REDIRECTS + 1):
                if "@" in url.partition("://")[2].partition("/")[0] or not url.lower().startswith(("http:", "https:")):
                    raise ApiError(400, "the URL, or one that it redirects to, is not a plain http or https URL")
                async with session.get(url, allow_redirects=False) as response:
                    if response.status in REDIRECT_STATUSES:
                        url = urljoin(str(response.url), response.headers.get("Location", ""))
                        continue
                    if response.status != 200:
                        raise ApiError(400, f"the URL returned status {response.status}")
                    await _save(response, file, limit)
                    return
            raise ApiError(400, f"the URL redirects more than {REDIRECTS} times")
    except TimeoutError:
        raise ApiError(400, f"the URL was not downloaded within {seconds:g} s") from None
    except (aiohttp.ClientError, OSError, ValueError) as error:
        raise ApiError(400, f"the URL cannot be downloaded ({first_line(error)})") from None


async def _save(response: aiohttp.ClientResponse, file: IO[bytes], limit: int) -> None:
    size = 0
    async for part in response.content.iter_chunked(2**16):
        size += len(part)
        if size > limit:
            raise ApiError(413, f"the URL has more than {limit} bytes")
        file.write(part)
    file.flush()

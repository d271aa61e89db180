"""Images by http(s): only from listed hosts, never from an address that is not public, and no longer than allowed.

The address is checked where the connection is made, on the very address that is connected to, so that neither a
redirect nor a name that resolves to something else a moment later (DNS rebinding) leads inside.
"""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore

from garserve.serving.errors import APIError, too_large

_REDIRECTS = 3
_REDIRECT_CODES = (301, 302, 303, 307, 308)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")

Resolve = Callable[[str, int], Sequence[str]]


def is_public(address: str) -> bool:
    """Say whether an IP address is one of the public internet, also where it is wrapped into IPv6."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in _NAT64:
            inner = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        if inner is not None:
            return is_public(str(inner))
        if ip.is_site_local:
            return False
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified)


def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a host."""
    return [str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]


class _CheckedBackend(httpcore.AsyncNetworkBackend):
    """Connects to the address that it has checked."""

    def __init__(self, resolve: Resolve, allowed: Callable[[str], bool]) -> None:
        self._resolve, self._allowed = resolve, allowed
        self._plain = httpcore.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.AsyncNetworkStream:
        """Resolve, check every address, and connect to the first."""
        try:
            addresses = await asyncio.to_thread(self._resolve, host, port)
        except (OSError, UnicodeError):
            raise APIError(400, f"image_url: the host {host!r:.80} is not known", code="image_fetch") from None
        if not addresses or not all(self._allowed(address) for address in addresses):
            raise APIError(
                400, f"image_url: {host!r:.80} is not a public address; it is not fetched", code="image_host"
            )
        return await self._plain.connect_tcp(
            addresses[0], port, timeout=timeout, local_address=local_address, socket_options=socket_options
        )


def _joined(url: str, target: str) -> str:
    try:
        return urljoin(url, target)
    except ValueError:
        raise APIError(400, "image_url: redirected to what is not a URL", code="image_fetch") from None


class Fetcher:
    """Fetches images from the listed hosts."""

    def __init__(
        self,
        hosts: Sequence[str],
        *,
        max_bytes: int,
        seconds: float,
        resolve: Resolve = resolve,
        allowed: Callable[[str], bool] = is_public,
    ) -> None:
        self._hosts = {host.lower().rstrip(".") for host in hosts}
        self._max_bytes, self._seconds = max_bytes, seconds
        self._backend = _CheckedBackend(resolve, allowed)

    async def __call__(self, url: str) -> bytes:
        """Return the bytes behind a URL. Raises APIError (400 or 413) where they may not or cannot be had."""
        try:
            async with (
                asyncio.timeout(self._seconds),
                httpcore.AsyncConnectionPool(network_backend=self._backend) as pool,
            ):
                for _ in range(_REDIRECTS + 1):
                    answer = await self._get(pool, self._checked(url))
                    if isinstance(answer, bytes):
                        return answer
                    url = _joined(url, answer)
        except TimeoutError:
            message = f"image_url: not there within {self._seconds:g} seconds"
            raise APIError(400, message, code="image_fetch") from None
        except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.TimeoutException, OSError) as error:
            raise APIError(400, f"image_url: cannot be fetched ({type(error).__name__})", code="image_fetch") from None
        raise APIError(400, f"image_url: more than {_REDIRECTS} redirects", code="image_fetch")

    def _checked(self, url: str) -> str:
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").lower().rstrip("."), parts.port
        except ValueError:
            raise APIError(400, "image_url: not a URL", code="image_url") from None
        if parts.scheme not in ("http", "https") or parts.username is not None or parts.password is not None:
            raise APIError(400, f"image_url: expected http(s)://host/path, got {url!r:.80}", code="image_url")
        if not {host, f"{host}:{port}"} & set(self._hosts):
            raise APIError(
                400, f"image_url: {host!r:.80} is not a host that this server fetches from", code="image_host"
            )
        if port not in (None, 80, 443) and f"{host}:{port}" not in self._hosts:
            raise APIError(400, f"image_url: port {port} is not one that this server fetches from", code="image_host")
        try:
            url.encode("ascii")
        except UnicodeEncodeError:
            raise APIError(
                400, "image_url: expected ASCII, other characters percent-encoded", code="image_url"
            ) from None
        return url

    async def _get(self, pool: httpcore.AsyncConnectionPool, url: str) -> bytes | str:
        """Return a body, or where a redirect leads."""
        async with pool.stream("GET", url, headers={"Accept": "image/*", "User-Agent": "garserve"}) as response:
            if response.status in _REDIRECT_CODES:
                target = dict(response.headers).get(b"location") or dict(response.headers).get(b"Location") or b""
                return target.decode("latin-1")
            if response.status != 200:
                raise APIError(400, f"image_url: answered with status {response.status}", code="image_fetch")
            data = bytearray()
            async for piece in response.aiter_stream():
                data += piece
                if len(data) > self._max_bytes:
                    raise too_large(f"image_url: more than {self._max_bytes} bytes", param="image_url")
            return bytes(data)

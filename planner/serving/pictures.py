"""Pictures of requests: data URLs, and remote ones where the server allows them."""

from __future__ import annotations

import base64
import binascii
import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpcore
from typing_extensions import override

from planner.ir.errors import InputError

_DATA = re.compile(r"data:image/[\w.+-]+;base64,", re.ASCII)
_MOST_REDIRECTS = 3
# For all of a fetch, from its first name to its last byte.
_SECONDS = 10.0


def is_remote(url: str) -> bool:
    """Whether a picture has to be fetched."""
    return url.startswith(("http://", "https://"))


def picture_file(url: str, name: str, most_bytes: int, remote: bool) -> bytes:
    """The file of the picture at a URL; InputError where it cannot be had, or may not.

    The URL is ``data:image/...;base64,...`` or, where `remote` pictures are fetched, of at most so
    many bytes, ``http(s)://...``. `name`: of the picture, for messages.
    """
    head = _DATA.match(url)
    if head is not None:
        try:
            return base64.b64decode(url[head.end() :], validate=True)
        except (binascii.Error, ValueError):
            raise InputError(f"the image '{name}' is no base64") from None
    if is_remote(url):
        if not remote:
            raise InputError(
                "this server fetches no images: send them as data URLs (data:image/png;base64,...)"
            )
        return fetch(url, most_bytes)
    raise InputError(f"the image '{name}' is no URL that starts with data:image/...;base64,")


class _PublicOnly(httpcore.NetworkBackend):
    """Connects to addresses of the open internet alone.

    What a name resolves to is looked at and connected to in one go, so that no second answer of a
    name server, and no redirect, leads anywhere else.
    """

    def __init__(self) -> None:
        self._backend = httpcore.SyncBackend()

    @override
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            raise InputError("the host of an image's URL has no address") from None
        addresses = [str(entry[4][0]) for entry in found]
        if not all(is_public(address) for address in addresses):
            raise InputError("an image's URL leads to an address that is not public")
        return self._backend.connect_tcp(addresses[0], port, timeout, local_address, socket_options)


class _Timed(httpcore.NetworkBackend):
    """A backend whose connections all end at one time, however much comes of them before."""

    def __init__(self, backend: httpcore.NetworkBackend, ends: float) -> None:
        self._backend, self._ends = backend, ends

    @override
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore.NetworkStream:
        left = _seconds_left(self._ends)
        stream = self._backend.connect_tcp(host, port, left, local_address, socket_options)
        return _TimedStream(stream, self._ends)


class _TimedStream(httpcore.NetworkStream):
    """A connection of `_Timed`."""

    def __init__(self, stream: httpcore.NetworkStream, ends: float) -> None:
        self._stream, self._ends = stream, ends

    @override
    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, _seconds_left(self._ends))

    @override
    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, _seconds_left(self._ends))

    @override
    def close(self) -> None:
        self._stream.close()

    @override
    def start_tls(
        self,
        ssl_context: ssl.SSLContext,
        server_hostname: str | None = None,
        timeout: float | None = None,
    ) -> httpcore.NetworkStream:
        left = _seconds_left(self._ends)
        return _TimedStream(self._stream.start_tls(ssl_context, server_hostname, left), self._ends)

    @override
    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


def _seconds_left(ends: float) -> float:
    left = ends - time.monotonic()
    if left <= 0:
        raise httpcore.ReadTimeout
    return left


def is_public(address: str) -> bool:
    """Whether an IP address is one of the open internet, also by the IPv4 address it stands for."""
    try:
        parsed = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(parsed, ipaddress.IPv6Address):
        teredo = parsed.teredo
        inner = parsed.ipv4_mapped or parsed.sixtofour or (teredo[1] if teredo else None)
        # NAT64 (RFC 6052), too, carries the address in its last four bytes.
        if parsed in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.IPv4Address(int(parsed) & 0xFFFFFFFF)
        if inner is not None:
            parsed = inner
    return parsed.is_global and not parsed.is_multicast


def fetch(
    url: str,
    most_bytes: int,
    backend: httpcore.NetworkBackend | None = None,
    seconds: float = _SECONDS,
) -> bytes:
    """What is at a URL; InputError: it is nowhere, somewhere private, too large, or not there
    within so many seconds."""
    timed = _Timed(backend or _PublicOnly(), time.monotonic() + seconds)
    with httpcore.ConnectionPool(network_backend=timed) as pool:
        for _ in range(_MOST_REDIRECTS + 1):
            parts = urlsplit(url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise InputError("an image's URL leads to something that is not http or https")
            try:
                with pool.stream("GET", url) as response:
                    headers = {name.lower(): value for name, value in response.headers}
                    if response.status in (301, 302, 303, 307, 308) and b"location" in headers:
                        url = urljoin(url, headers[b"location"].decode("latin-1"))
                        continue
                    if response.status != 200:
                        raise InputError(f"an image's URL answers with status {response.status}")
                    return _all_of(response, most_bytes)
            except httpcore.TimeoutException:
                raise InputError(f"an image's URL is not read within {seconds:g} seconds") from None
            except (httpcore.NetworkError, httpcore.ProtocolError):
                raise InputError("an image's URL cannot be read") from None
            except (ValueError, TypeError, UnicodeError, httpcore.UnsupportedProtocol):
                raise InputError("an image's URL is none") from None
    raise InputError(f"an image's URL redirects more than {_MOST_REDIRECTS} times")


def _all_of(response: httpcore.Response, most_bytes: int) -> bytes:
    contents = bytearray()
    for piece in response.iter_stream():
        contents += piece
        if len(contents) > most_bytes:
            raise InputError(f"an image has more than {most_bytes} bytes")
    return bytes(contents)

"""The server under the HTTP application: connections that are too slow, and how it stops."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI
from typing_extensions import override
from uvicorn.protocols.http.auto import AutoHTTPProtocol

from planner.serving.service import ChatService

# Seconds. Clients keep connections for five; a server that does too closes some that are in use.
_KEEP_ALIVE = 65
# For all of a request's header, and for a client that does not read to go on.
_HEADER, _READING = 20.0, 60.0
# Between the error that clients get when the server stops and the end of their connections, and
# from then on until what has not ended is cancelled.
_FAREWELL = 3


class HttpServer(uvicorn.Server):
    """Serves an application until SIGTERM or Ctrl-C, and answers that run for `grace` seconds more.

    Clients that wait then are told that the server stops; a second signal tells them at once.
    """

    def __init__(self, app: FastAPI, service: ChatService[Any], grace: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http=TimedConnection,
                log_level="warning",
                access_log=False,
                ws="none",
                server_header=False,
                timeout_graceful_shutdown=int(grace) + 2 * _FAREWELL,
                timeout_keep_alive=_KEEP_ALIVE,
            )
        )
        self._service, self._grace, self._has_given_up = service, grace, False

    @override
    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    @override
    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        timers = (
            self._loop.call_later(self._grace, self._give_up),
            self._loop.call_later(self._grace + _FAREWELL, self._hang_up),
        )
        await super().shutdown(sockets)
        for timer in timers:
            timer.cancel()

    @override
    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit and not self._has_given_up:
            self._loop.call_soon_threadsafe(self._give_up)
        else:
            super().handle_exit(sig, frame)

    def _give_up(self) -> None:
        if not self._has_given_up:
            self._has_given_up = True
            self._service.give_up()

    def _hang_up(self) -> None:
        """On clients that do not read what they are told, or do not send what they began."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


class TimedConnection(asyncio.Protocol):
    """uvicorn's connection, which waits without an end for a header, and for a client to read."""

    def __init__(self, **arguments: Any) -> None:
        self._inner: Any = AutoHTTPProtocol(**arguments)
        self._loop = asyncio.get_running_loop()
        self._timers: dict[str, asyncio.TimerHandle] = {}

    @override
    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._inner.connection_made(transport)
        self._allow("header", _HEADER)

    @override
    def data_received(self, data: bytes) -> None:
        self._inner.data_received(data)
        cycle = self._inner.cycle
        if cycle is not None and not cycle.response_complete:
            # The header was complete; `BodyLimit` times the rest.
            self._done("header")
        elif "header" not in self._timers:
            self._allow("header", _HEADER)

    @override
    def eof_received(self) -> bool | None:
        closes: bool | None = self._inner.eof_received()
        return closes

    @override
    def connection_lost(self, exc: Exception | None) -> None:
        for what in list(self._timers):
            self._done(what)
        self._inner.connection_lost(exc)

    @override
    def pause_writing(self) -> None:
        self._allow("reading", _READING)
        self._inner.pause_writing()

    @override
    def resume_writing(self) -> None:
        self._done("reading")
        self._inner.resume_writing()

    def _allow(self, what: str, seconds: float) -> None:
        """Something so many seconds, or the connection ends."""
        self._timers[what] = self._loop.call_later(seconds, self._transport.abort)

    def _done(self, what: str) -> None:
        if (timer := self._timers.pop(what, None)) is not None:
            timer.cancel()

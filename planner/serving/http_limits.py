"""What is settled about a request before it is looked into: its size, its pace, who sends it."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Sequence

from fastapi import HTTPException, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

# Seconds between two pieces of a body, and for all of it.
_PACE, _WHOLE = 20.0, 60.0


class BodyLimit:
    """ASGI middleware that refuses bodies which are too long, or do not come."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most_bytes = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        seen, is_whole = 0, False
        ends = time.monotonic() + _WHOLE

        async def counted() -> Message:
            nonlocal seen, is_whole
            if is_whole:
                return await receive()
            try:
                left = max(0.0, ends - time.monotonic())
                message = await asyncio.wait_for(receive(), min(_PACE, left))
            except TimeoutError:
                closing = {"Connection": "close"}
                raise HTTPException(408, "the body does not come in time", closing) from None
            is_whole = not message.get("more_body", False)
            seen += len(message.get("body", b""))
            if seen > self._most_bytes:
                raise HTTPException(413, f"the body has more than {self._most_bytes} bytes")
            return message

        await self._app(scope, counted, send)


class KeyCheck:
    """A dependency that lets requests pass with one of the API keys, sent as ``Authorization:
    Bearer KEY``; all, where there is none."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._keys = [key.encode() for key in keys]

    def __call__(self, request: Request) -> None:
        """Raise HTTPException 401 for others."""
        if not self._keys:
            return
        scheme, _, given = request.headers.get("authorization", "").partition(" ")
        # All keys are compared, each in a time that does not depend on where it differs.
        matches = [hmac.compare_digest(key, given.encode()) for key in self._keys]
        if scheme.lower() != "bearer" or not any(matches):
            raise HTTPException(401, "no valid API key", {"WWW-Authenticate": "Bearer"})

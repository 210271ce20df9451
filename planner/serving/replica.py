"""One of several services on a Ray cluster.

Ray Serve starts replicas, watches them and puts others in the place of those that die; which one
answers a request is its choice, of two the one with the shorter queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

from planner.ir.errors import PlannerError
from planner.ray_workers import enter
from planner.serving.chat_format import ChatRequest, Usage
from planner.serving.jobs import Done, Event, Failed, Piece
from planner.serving.opening import ServiceSettings, load_service


class Replica:
    """A service that is asked by calls instead of HTTP."""

    def __init__(self, settings: ServiceSettings, folder: str) -> None:
        enter(folder)
        self._service = load_service(settings)
        self._service.start()

    async def answer(
        self, request: dict[str, Any], ttft_ms: float | None, tpot_ms: float | None
    ) -> AsyncIterator[tuple[Event, Usage | None]]:
        """What comes of a request, `Failed` instead of an error; the last with what it took."""
        try:
            asking = self._service.asked(ChatRequest(**request), ttft_ms, tpot_ms)
            async with asking as asked:
                event: Event = await asked.events.get()
                while isinstance(event, Piece):
                    yield event, None
                    event = await asked.events.get()
                usage = None
                if isinstance(event, Done):
                    usage = await asyncio.to_thread(self._service.usage, asked, event)
                yield event, usage
        except PlannerError as error:
            yield Failed(error), None

    def metrics(self) -> str:
        """For Prometheus."""
        return self._service.metrics_text().decode()

    def check_health(self) -> None:
        """Asked by Ray Serve: a replica that raises is replaced."""
        if not self._service.is_healthy:
            raise RuntimeError("the engine has stopped")

    def record_autoscaling_stats(self) -> dict[str, float]:
        """Asked by Ray Serve: deadlines so far that were missed, or refused; and all of them."""
        missed, deadlines = self._service.metrics.deadlines()
        return {"missed": missed, "deadlines": deadlines}

    def __del__(self) -> None:
        # What runs is finished; Ray Serve has sent no more for a while.
        if hasattr(self, "_service"):
            self._service.stop()

"""What a server serves: one model behind an engine, and what requests for it mean."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Generic, TypeVar

from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.plan_costs import PlanCosts
from planner.serving.chat_format import ChatRequest, PlanUsed, Usage
from planner.serving.chat_prompts import PromptReader
from planner.serving.engine import Engine
from planner.serving.governor import Deadline
from planner.serving.jobs import Busy, Done, Event, Job
from planner.serving.metrics import Metrics
from planner.serving.reading import Reading, Wait
from planner.serving.running_batch import Sampler


@dataclass(eq=False)
class Asked:
    """A request that was accepted: what comes of it, in this event loop."""

    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))


AskedT = TypeVar("AskedT", bound=Asked)


class ChatService(ABC, Generic[AskedT]):
    """What answers requests, for one model, under the name by which they ask for it."""

    def __init__(self, name: str) -> None:
        self.name, self.created = name, int(time.time())

    @abstractmethod
    def start(self) -> None:
        """Begin to take requests."""

    @abstractmethod
    def stop(self) -> None:
        """Take no more, and finish those there are."""

    @abstractmethod
    def give_up(self) -> None:
        """Take no more, and tell whoever waits that the server stops; in the event loop."""

    @property
    @abstractmethod
    def is_healthy(self) -> bool:
        """Whether it works, and takes requests."""

    @abstractmethod
    def metrics_text(self) -> bytes:
        """For Prometheus."""

    @abstractmethod
    def asked(
        self, request: ChatRequest, ttft_ms: float | None, tpot_ms: float | None
    ) -> AbstractAsyncContextManager[AskedT]:
        """Have a request answered; when the block is left, it is not wanted any more.

        It may have `ttft_ms` until its first token, and `tpot_ms` for each that follows. InputError
        where it asks for what there is not, Busy where it cannot be served now.
        """

    @abstractmethod
    def usage(self, asked: AskedT, done: Done) -> Usage:
        """What an answer took, beside the base model's cost of it."""


@dataclass(eq=False, kw_only=True)
class AskedHere(Asked):
    """A request that this process answers."""

    job: Job


class Service(ChatService[AskedHere]):
    """One model, served by an engine of this process."""

    def __init__(
        self,
        name: str,
        graph: Graph,
        engine: Engine,
        reader: PromptReader,
        metrics: Metrics,
        temperature: float,  # for requests that give none
    ) -> None:
        super().__init__(name)
        self.engine, self.metrics = engine, metrics
        self._graph, self._reader, self._temperature = graph, reader, temperature
        self._reading = Reading(reader)
        self._known_cost = lru_cache(maxsize=1024)(self._cost_of_rung)

    @override
    def start(self) -> None:
        self._reading.start()
        self.engine.start()

    @override
    def stop(self) -> None:
        self.engine.stop()
        self._reading.stop()

    @override
    def give_up(self) -> None:
        self.engine.give_up()
        self._reading.give_up()

    @property
    @override
    def is_healthy(self) -> bool:
        return self.engine.is_healthy

    @override
    def metrics_text(self) -> bytes:
        return self.metrics.text()

    @override
    @asynccontextmanager
    async def asked(
        self, request: ChatRequest, ttft_ms: float | None, tpot_ms: float | None
    ) -> AsyncIterator[AskedHere]:
        arrived = time.monotonic()
        dearest = self.engine.ladder.within(request.budget)
        temperature = self._temperature if request.temperature is None else request.temperature
        limits = (request.deadline_ms, ttft_ms, tpot_ms)
        deadline = Deadline(*(math.inf if ms is None else ms / 1000 for ms in limits))
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[Event] = asyncio.Queue()

        def emit(event: Event) -> None:
            # A server that is killed closes its loop first.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(events.put_nowait, event)

        with self.engine.place(deadline, arrived):
            wait = Wait(*self.engine.latest(deadline, arrived))
            try:
                prompt = await self._reading.prompt(request.messages, wait)
            except Busy as error:
                self.metrics.refused(error.reason)
                raise
            except asyncio.CancelledError:
                self.metrics.aborted()
                raise
            job = Job(
                prompt,
                self._new_tokens(request, prompt.tokens),
                dearest,
                Sampler(temperature, request.top_p, request.seed),
                emit,
                request.stops,
                deadline,
                arrived,
            )
            self.engine.submit(job)
        try:
            yield AskedHere(events, job=job)
        finally:
            job.is_cancelled = True

    @override
    def usage(self, asked: AskedHere, done: Done) -> Usage:
        prompt, rung = asked.job.prompt, self.engine.ladder.rungs[done.rung]
        kept = tuple(sorted(done.kept.items()))
        sizes = prompt.image_tokens, prompt.tokens, done.tokens, kept
        # A scheduler's plans are of one prompt each.
        is_known = done.plan is rung.plan
        cost = self._known_cost(done.rung, *sizes) if is_known else self._cost(done.plan, *sizes)
        return Usage(
            prompt_tokens=prompt.tokens,
            completion_tokens=done.tokens,
            total_tokens=prompt.tokens + done.tokens,
            cost=cost,
            plan=PlanUsed(
                budget=rung.budget,
                layers_off=list(done.plan.layers_off),
                image_tokens=dict(kept),
            ),
        )

    def _cost_of_rung(self, rung: int, *sizes: Any) -> dict[str, dict[str, float]]:
        return self._cost(self.engine.ladder.rungs[rung].plan, *sizes)

    def _cost(
        self, plan: Plan, image_tokens: int, tokens: int, new_tokens: int, kept: tuple[Any, ...]
    ) -> dict[str, dict[str, float]]:
        text_tokens = tokens - image_tokens
        load = Workload.default(self._graph, image_tokens, text_tokens, new_tokens - 1)
        return PlanCosts(self._graph, load).of(plan, dict(kept))

    def _new_tokens(self, request: ChatRequest, prompt_tokens: int) -> int:
        """The most tokens of an answer: what is asked for, or what there is room for."""
        room = self._reader.limits.tokens - prompt_tokens
        asked = request.max_completion_tokens or request.max_tokens
        if room < (asked or 1):
            raise InputError(
                f"the prompt's {prompt_tokens} tokens and {asked or 1} of answer are more than "
                f"the {self._reader.limits.tokens} that there is room for"
            )
        return asked or room

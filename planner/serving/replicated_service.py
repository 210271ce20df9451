"""A service whose answers are made by replicas on a Ray cluster.

Requests are accepted here, and are then not lost: where a replica dies, what it was answering is
begun again elsewhere, under the same plan and from the same seed, and what was said already is not
said twice.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import ray
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from ray import serve
from ray.exceptions import RayActorError, RayError
from typing_extensions import override

from planner.ir.errors import InputError, PlannerError, first_line
from planner.ray_workers import connect
from planner.serving.chat_format import ChatRequest, Usage
from planner.serving.jobs import Busy, Done, Failed, Piece, stopping
from planner.serving.opening import ServiceSettings
from planner.serving.replica import Replica
from planner.serving.scaling import wanted_replicas
from planner.serving.service import Asked, ChatService

_NAME = "planner"
# In seconds: for how long more, or fewer, replicas have to be wanted, of requests on average.
PACE = {"upscale_delay_s": 5.0, "downscale_delay_s": 60.0, "look_back_period_s": 30.0}


@dataclass(eq=False)
class AskedThere(Asked):
    """A request that a replica answers."""

    usage: Usage | None = None


class ReplicatedService(ChatService[AskedThere]):
    """Replicas of one service.

    Args:
        settings: of each.
        handle: of the deployment.
    """

    def __init__(self, settings: ServiceSettings, handle: Any) -> None:
        super().__init__(settings.request.model)
        self._handle, self._every = handle.options(stream=True), handle
        self._seconds = settings.limits.seconds
        self._budgets = sorted(set(settings.budgets))
        self._open: set[AskedThere] = set()
        self._has_given_up = False

    @override
    def start(self) -> None:
        pass

    @override
    def stop(self) -> None:
        serve.shutdown()
        ray.shutdown()

    @override
    def give_up(self) -> None:
        self._has_given_up = True
        for asked in self._open:
            asked.events.put_nowait(Failed(stopping()))

    @property
    @override
    def is_healthy(self) -> bool:
        application = serve.status().applications.get(_NAME)
        return application is not None and application.status == "RUNNING"

    @override
    def metrics_text(self) -> bytes:
        texts = self._every.broadcast("metrics").results()
        return _with_replicas([text for text in texts if isinstance(text, str)])

    @override
    @asynccontextmanager
    async def asked(
        self, request: ChatRequest, ttft_ms: float | None, tpot_ms: float | None
    ) -> AsyncIterator[AskedThere]:
        if self._has_given_up:
            raise stopping()
        if request.seed is None:
            # An answer that is begun again has to be the same.
            request = request.model_copy(update={"seed": random.getrandbits(62)})
        asked = AskedThere()
        answering = asyncio.create_task(self._answer(asked, request, ttft_ms, tpot_ms))
        self._open.add(asked)
        try:
            yield asked
        finally:
            self._open.discard(asked)
            answering.cancel()

    @override
    def usage(self, asked: AskedThere, done: Done) -> Usage:
        assert asked.usage is not None
        return asked.usage

    async def _answer(self, asked: AskedThere, request: ChatRequest, *limits: float | None) -> None:
        """Pass on what comes of a request, from as many replicas as it takes."""
        begun, said, rung = time.monotonic(), "", None
        while True:
            stream = self._handle.answer.remote(request.model_dump(), *limits)
            again = ""
            try:
                async for event, asked.usage in stream:
                    if isinstance(event, Piece):
                        rung, again = event.rung, again + event.text
                        if not (again.startswith(said) or said.startswith(again)):
                            raise PlannerError("a replica was lost, and another answers otherwise")
                        event = Piece(again[len(said) :], rung)
                        said = max(said, again, key=len)
                    asked.events.put_nowait(event)
                return
            except RayActorError:
                failure: PlannerError | None = None
                if time.monotonic() - begun > self._seconds:
                    failure = Busy(f"no answer within {self._seconds:g} seconds", "timeout", 1)
            except RayError as error:
                failure = PlannerError(f"a replica failed: {first_line(error)}")
            except PlannerError as error:
                failure = error
            finally:
                stream.cancel()
            if failure is not None:
                asked.events.put_nowait(Failed(failure))
                return
            # What was accepted is answered, if late, and under the plan that it has begun with.
            budget = request.budget if rung is None else self._budgets[rung]
            request = request.model_copy(update={"budget": budget, "deadline_ms": None})
            limits = (None, None)


def open_replicas(
    settings: ServiceSettings, address: str, replicas: tuple[int, int]
) -> ReplicatedService:
    """A service of at least and at most so many replicas.

    InputError where there is no cluster at `address` (``local`` starts one), or replicas do not
    start.
    """
    connect(address)
    fewest, most = replicas
    limits = settings.limits
    deployment = serve.deployment(
        name="replica",
        max_ongoing_requests=limits.answers + limits.waiting,
        ray_actor_options={"num_gpus": int(settings.place.startswith("cuda"))},
        autoscaling_config={
            "min_replicas": fewest,
            "max_replicas": most,
            "target_ongoing_requests": limits.answers,
            **PACE,
            "policy": {"policy_function": wanted_replicas},
        },
    )(Replica)
    serve.start(proxy_location="Disabled")
    try:
        handle = serve.run(deployment.bind(settings, os.getcwd()), name=_NAME, route_prefix=None)
    except RuntimeError as error:
        serve.shutdown()
        raise InputError(f"the replicas do not start: {first_line(error)}") from None
    return ReplicatedService(settings, handle)


class _Replicas:
    """Metrics of several replicas, as a collector."""

    def __init__(self, texts: list[str]) -> None:
        self._texts = texts

    def collect(self) -> list[Metric]:
        """By name, the samples of each replica under a label of its own."""
        found: dict[str, Metric] = {}
        for number, text in enumerate(self._texts):
            for family in text_string_to_metric_families(text):
                known = found.setdefault(
                    family.name, Metric(family.name, family.documentation, family.type)
                )
                for sample in family.samples:
                    labels = {**sample.labels, "replica": str(number)}
                    known.add_sample(sample.name, labels, sample.value)
        count = GaugeMetricFamily("planner:replicas", "Services that answer.", len(self._texts))
        return [*found.values(), count]


def _with_replicas(texts: list[str]) -> bytes:
    registry = CollectorRegistry()
    registry.register(_Replicas(texts))
    return generate_latest(registry)

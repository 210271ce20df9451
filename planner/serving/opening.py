"""A service put together: the model loaded, its ladder made, everything warmed up."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from planner.ir.errors import InputError
from planner.kernels.choice import Kernels
from planner.loading import check_places, load_model
from planner.models.running.skipping import session_on
from planner.models.scheduling import Scheduled, compile_schedule, load_scheduled
from planner.planning.request import Request
from planner.progress import Say
from planner.serving.chat_prompts import PromptLimits, PromptReader
from planner.serving.engine import Engine, EngineLimits
from planner.serving.governor import Governor
from planner.serving.metrics import Metrics
from planner.serving.running_batch import RunningBatch
from planner.serving.scheduled_batch import ScheduledBatch, scheduled_ladder
from planner.serving.service import Service
from planner.serving.warm_up import make_ladder, measure_rungs

_MOST_TOKENS = 4096


@dataclass(frozen=True)
class ServiceSettings:
    """What a service is opened with; it can be sent to other machines."""

    request: Request  # model, switches, tokens, utilities
    budgets: tuple[float, ...]
    scheduler: str | None = None
    dtype: str = "auto"
    place: str = "cpu"
    kernels: str = "auto"
    most_tokens: int | None = None  # of a prompt with its answer
    images: int = 8  # of a request
    remote_images: bool = False
    limits: EngineLimits = field(default_factory=EngineLimits)


def load_service(settings: ServiceSettings, progress: Say = lambda stage: None) -> Service:
    """Load a model and open its service; InputError where it cannot be served so.

    What is loaded by then stays for good, so garbage collection does not look through it any more:
    a full collection took seconds, in which no request was answered.
    """
    request, scheduled = settings.request, None
    progress("load")
    if settings.scheduler is None:
        model, processor, _ = load_model(request.model, settings.dtype, settings.place)
    else:
        dearest = replace(request, budget=max(settings.budgets))
        schedule = compile_schedule(dearest, settings.scheduler)
        model, processor, scheduled = load_scheduled(schedule, settings.dtype, settings.place)
    service = open_service(
        request.model,
        model,
        processor,
        settings.budgets,
        prompts=prompt_limits(model, settings.most_tokens, settings.images, settings.remote_images),
        limits=settings.limits,
        kernels=settings.kernels,
        progress=progress,
        scheduled=scheduled,
        switches=request.switches,
        tokens=request.tokens,
        utilities=request.utilities,
    )
    gc.collect()
    gc.freeze()
    return service


def open_service(
    name: str,
    model: Any,
    processor: Any,
    budgets: Sequence[float],
    *,
    prompts: PromptLimits | None = None,
    limits: EngineLimits | None = None,
    kernels: str = "auto",
    progress: Say = lambda stage: None,
    scheduled: Scheduled | None = None,
    **options: Any,
) -> Service:
    """A service for a model with weights; InputError where it cannot be served so.

    Args:
        name: by which requests ask for it.
        model: a stock transformers model; it is compiled, and nobody else may run it.
        processor: of the model, with a chat template.
        budgets: of the ladder, fractions of the base model's FLOPs.
        prompts: what a prompt may hold; `prompt_limits` says what by default.
        limits: of the batch and its queue.
        kernels, options: as for `planner.compile`.
        progress: told what is being done.
        scheduled: the model under a scheduler, not attached; it plans every prompt by itself, and
            of the options `tokens` alone counts.
    """
    from planner.api import graph_of

    if options.get("kv") is not None:
        raise InputError("a cache that evicts cannot be served: serve without a KV policy")
    prompts = prompts or prompt_limits(model)
    reader = PromptReader(model, processor, prompts)
    batch: RunningBatch
    if scheduled is None:
        ladder = make_ladder(model, processor, budgets, kernels, options, progress)
        graph, batch = graph_of(model), RunningBatch(model)
    else:
        graph = scheduled.graph
        session_on(model, graph, freeze=True, kernels=Kernels.of(kernels))
        tokens = options.get("tokens") or ""
        ladder = scheduled_ladder(scheduled, budgets, tokens)
        batch = ScheduledBatch(scheduled, tokens)
    governor = Governor(measure_rungs(batch, ladder, reader, progress))
    # What it holds is by now partly another's: a model's weights before they were packed.
    reader.template.stop()
    metrics = Metrics(name)
    tokenizer = getattr(processor, "tokenizer", processor)
    engine = Engine(
        batch, tokenizer, ladder, governor, prompts.tokens, metrics, limits or EngineLimits()
    )
    config = model.generation_config
    temperature = float(config.temperature or 1.0) if config.do_sample else 0.0
    return Service(name, graph, engine, reader, metrics, temperature)


def prompt_limits(
    model: Any, tokens: int | None = None, images: int = 8, remote_images: bool = False
) -> PromptLimits:
    """What a prompt of a model may hold.

    `tokens` are of a prompt with its answer: at most as many as the model knows places for, else
    an InputError; these are the default up to 4096.
    """
    places = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if tokens is not None:
        check_places(model, tokens)
    most = tokens or min(places or _MOST_TOKENS, _MOST_TOKENS)
    return PromptLimits(most, images, remote_images=remote_images)

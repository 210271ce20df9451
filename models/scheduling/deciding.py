"""A model with what makes its plans, loaded as users name them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.loading import load_model
from planner.models.scheduling.schedule_compiler import compile_schedule, load_scheduled
from planner.models.scheduling.scheduled_model import Scheduled
from planner.planning.request import Request
from planner.progress import Say


@dataclass(frozen=True, eq=False)
class Deciding:
    """A model with its weights, and the scheduler that makes its plans, if one does."""

    model: Any  # stock, in evaluation mode
    processor: Any
    graph: Graph
    scheduled: Scheduled | None = None


def load_deciding(
    request: Request,
    scheduler: str | None,
    budget: float,
    dtype: str,
    place: str,
    mask: bool = False,
    progress: Say = lambda stage: None,
) -> Deciding:
    """What a request names, with its scheduler where the user names one.

    Args:
        budget: that the scheduler has to be able to keep to.
        mask: as for `Scheduled`.

    Raises InputError where either cannot be loaded, or is of another model.
    """
    progress("load")
    trust = request.trust_remote_code
    if scheduler is None:
        model, processor, _ = load_model(request.model, dtype, place, trust)
        progress("lower")
        return Deciding(model, processor, lower_model(model, request.model))
    schedule = compile_schedule(replace(request, budget=budget), scheduler)
    model, processor, scheduled = load_scheduled(schedule, dtype, place, trust, mask)
    return Deciding(model, processor, scheduled.graph, scheduled)

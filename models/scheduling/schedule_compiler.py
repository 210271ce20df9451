"""From a scheduler's folder and a budget to a Schedule, and to a model running under it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.lowering import lower_model
from planner.ir.structure import tiles
from planner.loading import load_model
from planner.models.scheduling.scheduled_model import Scheduled
from planner.models.scheduling.scheduler import load_scheduler
from planner.models.scheduling.unified_layout import UnifiedSwitches
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model, tiny_llava_folder
from planner.planning.compiler import DEFAULT_DEVICE, find_device
from planner.planning.graph_cache import lowered_graph
from planner.planning.plan_costs import PlanCosts, published_cost
from planner.planning.request import Request
from planner.planning.selectors import stages_of
from planner.progress import Say
from planner.schedule import Schedule

# AdaLLaVA's released code counts the latency token and one more: its README's prefill of
# 7,227,678,532,923 FLOPs at 85 % is that of 644.279 tokens, where prompts of MME have 642.279.
RELEASED_TOKENS = 2


def scheduler_folder(name: str) -> Path:
    """Where a scheduler is: a folder, or the name of one that tiny-llava comes with."""
    shipped = tiny_llava_folder() / name.replace("-", "_")
    if name.startswith("adallava-") and shipped.is_dir():
        return shipped
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder '{name}' with a scheduler")
    return folder


def compile_schedule(
    request: Request,
    scheduler: str,
    progress: Say = lambda stage: None,
    convention: str = "planner",
) -> Schedule:
    """Check that a scheduler fits a model and a budget, and price its plans.

    Args:
        request: the model, one limit that the scheduler's switches can keep to, a token selector in
            front of them, and the prompt's tokens.
        scheduler: see `scheduler_folder`.
        convention: of published tables, which costs are also counted by.
    """
    wanted = Budget.of(request.budget)
    folder = scheduler_folder(scheduler)
    progress("lower")
    graph = lowered_graph(find_model(request.model, request.trust_remote_code))[0]
    progress("load the scheduler")
    network = load_scheduler(folder, graph)
    layout = network.layout
    load = Workload.default(graph, request.image_tokens, request.text_tokens, 0)
    progress("price")
    per_run = load.image_tokens_per_run
    stages = stages_of(request.tokens or "", load.image_tokens, per_run, tiles(graph))
    chip = request.device or DEFAULT_DEVICE
    layout = layout.under(load, stages, wanted.limits[0].metric, chip)
    limit = layout.limit(wanted)
    example = layout.example(limit, stages)
    cost = PlanCosts(graph, load, "llm").of(example)
    overhead: dict[str, float] = {}
    if not isinstance(layout, UnifiedSwitches):  # which counts its own
        longer = replace(load, text_tokens=load.text_tokens + 1)
        with_token = PlanCosts(graph, longer, "llm").of(example)
        overhead = {
            "latency_token": with_token["flops"]["plan"] - cost["flops"]["plan"],
            "scheduler": network.flops,
        }
    published: dict[str, dict[str, float]] = {}
    if convention != "planner":
        more = RELEASED_TOKENS if convention == "llm-viewer" else 0
        published = published_cost(
            convention, graph, example, load, find_device(request.device), more
        )
    return Schedule(
        model=request.model,
        fingerprint=str(graph.properties["fingerprint"]),
        scheduler=str(folder.resolve()),
        switches=layout.name,
        budget=str(wanted.limits[0]),
        limit=limit,
        of=layout.steps,
        measure=layout.measure,
        device=request.device or "",
        tokens=request.tokens or "",
        cost=cost,
        overhead=overhead,
        convention=convention,
        published=published,
    )


def load_scheduled(
    schedule: Schedule,
    dtype: str = "auto",
    place: str = "cpu",
    trust_remote_code: bool = False,
    mask: bool = False,
) -> tuple[Any, Any, Scheduled]:
    """(model, processor, the model as scheduled, not attached), as saved beside the scheduler.

    Raises InputError where either cannot be loaded, or is of another model.
    """
    model, processor, _ = load_model(schedule.scheduler, dtype, place, trust_remote_code)
    graph = lower_model(model, Path(schedule.model).name)
    scheduler = load_scheduler(schedule.scheduler, graph)
    scheduler.to(device=model.device)
    if schedule.fingerprint != graph.properties["fingerprint"]:
        raise InputError(
            f"the schedule was made for '{schedule.model}' ({schedule.fingerprint}), and the "
            f"checkpoint in '{schedule.scheduler}' is another model"
        )
    return model, processor, Scheduled(model, graph, scheduler, mask=mask)

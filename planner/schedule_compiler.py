"""From a scheduler's folder and a budget to a Schedule, and to a model running under it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model, tiny_llava_folder
from planner.planning.compiler import DEFAULT_DEVICE, lowered_graph
from planner.planning.pricing import Pricing, compared
from planner.planning.switches import SwitchSet, with_switches
from planner.schedule import Schedule

if TYPE_CHECKING:
    from planner.models.scheduling import Scheduled

__all__ = ["PlanCosts", "compile_schedule", "load_scheduled", "scheduler_folder"]

Progress = Callable[[str], None]


@dataclass(frozen=True, eq=False)
class PlanCosts:
    """What a scheduler's plans cost under one workload: the language model's prefill.

    Args:
        graph: of the model.
        workload: token counts.
        tokens: a token selector in front of the switches, "" for none.
    """

    graph: Graph
    workload: Workload
    tokens: str = ""

    def of(self, plan: Plan) -> dict[str, dict[str, float]]:
        """Metric -> ``{"plan", "base", "fraction"}``, against the model without any plan."""
        return compared(self._pricing.cost_of(plan), self._base, ("flops", "kv"))

    @cached_property
    def _pricing(self) -> Pricing:
        switches = SwitchSet.parse("layers,heads,mlp")
        if self.tokens:
            load = self.workload
            switches = switches.with_selector(
                self.tokens, load.image_tokens, load.image_tokens_per_run
            )
        graph = with_switches(self.graph, like_heads=True)
        return Pricing(graph, self.workload, switches, device(DEFAULT_DEVICE), "llm")

    @cached_property
    def _base(self) -> dict[str, float]:
        fingerprint = str(self.graph.properties["fingerprint"])
        return self._pricing.cost_of(Plan(self.graph.name, fingerprint, self.graph.layers))


def scheduler_folder(name: str) -> Path:
    """Where a scheduler is: a folder, or the name of one that tiny-llava comes with.

    Raises:
        InputError: there is none.
    """
    shipped = tiny_llava_folder() / name.replace("-", "_")
    if name.startswith("adallava-") and shipped.is_dir():
        return shipped
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(f"there is no folder '{name}' with a scheduler")
    return folder


def compile_schedule(
    model: str,
    budget: Any,
    scheduler: str,
    tokens: str | None = None,
    image_tokens: int | None = None,
    text_tokens: int = 64,
    trust_remote_code: bool = False,
    progress: Progress = lambda stage: None,
) -> Schedule:
    """Check that a scheduler fits a model and a budget, and price its plans.

    Args:
        model: alias, folder or hub id.
        budget: one limit that the scheduler's switches can keep to.
        scheduler: see `scheduler_folder`.
        tokens: a token selector in front of the switches.
        image_tokens: of one sample; by default of one image.
        text_tokens: of the prompt besides them.
        trust_remote_code: as for transformers.
        progress: told the name of each stage.

    Raises:
        InputError: one sentence.
    """
    from planner.models.scheduling import load_scheduler
    from planner.planning.selectors import stages_of

    wanted = Budget.of(budget)
    folder = scheduler_folder(scheduler)
    progress("lower")
    graph = lowered_graph(find_model(model, trust_remote_code))[0]
    progress("load the scheduler")
    layout = load_scheduler(folder, graph).layout
    load = Workload.default(graph, image_tokens, text_tokens, 0)
    progress("price")
    stages: tuple[TokenStage, ...] = ()
    if tokens:
        stages = stages_of(tokens, load.image_tokens, load.image_tokens_per_run)
    layout = layout.under(load, stages, wanted.limits[0].metric)
    limit = layout.limit(wanted)
    return Schedule(
        model=model,
        fingerprint=str(graph.properties["fingerprint"]),
        scheduler=str(folder.resolve()),
        switches=layout.name,
        budget=str(wanted.limits[0]),
        limit=limit,
        of=layout.steps,
        measure=layout.measure,
        tokens=tokens or "",
        cost=PlanCosts(graph, load, tokens or "").of(layout.example(limit, stages)),
    )


def load_scheduled(
    schedule: Schedule,
    dtype: str = "auto",
    place: str = "cpu",
    trust_remote_code: bool = False,
    mask: bool = False,
) -> tuple[Any, Any, Scheduled]:
    """(model, processor, the model as scheduled), from the checkpoint beside the scheduler.

    Nothing is attached yet.

    Raises:
        InputError: the checkpoint or the scheduler cannot be loaded, or is of another model.
    """
    from planner.ir.lowering import lower_model
    from planner.loading import load_model
    from planner.models.scheduling import Scheduled, load_scheduler

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

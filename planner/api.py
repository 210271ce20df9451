"""Running models under budgets from Python.

    model = planner.compile(model, budget=0.65)
    model.generate(**inputs)
    with planner.budget(model, 0.5):
        model.generate(**inputs)

The model is the one passed in, obeying a plan; `restore` gives it back exactly as it was.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypeVar
from weakref import WeakKeyDictionary

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.compiler import DEFAULT_DEVICE, Compiled, Request, plan_graph
from planner.planning.figures import check_figures
from planner.planning.switches import SwitchSet

if TYPE_CHECKING:
    from torch import nn

    from planner.models.running.executor import Executor

__all__ = [
    "Planning",
    "budget",
    "compile",
    "graph_of",
    "kept_image_tokens",
    "name_of",
    "plan_of",
    "restore",
]

Model = TypeVar("Model", bound="nn.Module")


@dataclass
class Planning:
    """Plans of one loaded model; a plan is made once per budget.

    Attributes:
        graph: of the model.
        request: how plans are made, the budget aside.
        plans: made so far.
    """

    graph: Graph
    request: Request
    plans: dict[str, Plan] = field(default_factory=dict)

    def plan(self, value: Any) -> Plan:
        """The plan for a budget; a Plan is taken as it is."""
        if isinstance(value, Plan):
            value.check(self.graph)
            return value
        wanted = Budget.of(value)
        key = str(wanted.describe())
        if key not in self.plans:
            self.plans[key] = self.compiled(wanted).plan
        return self.plans[key]

    def compiled(self, wanted: Budget) -> Compiled:
        """Price and solve for a budget."""
        request = self.request
        if any(limit.metric == "latency" for limit in wanted.limits) and request.device is None:
            raise InputError("a latency budget needs device=...: seconds mean nothing without one")
        switches = SwitchSet.parse(request.switches)
        device = request.device or DEFAULT_DEVICE
        return plan_graph(self.graph, request, wanted, switches, device, lambda name: nullcontext())


@dataclass
class _Running:
    """What is known of a model that obeys plans."""

    planning: Planning
    executor: Executor
    active: list[Plan] = field(default_factory=list)


_running: WeakKeyDictionary[nn.Module, _Running] = WeakKeyDictionary()


def _of(model: nn.Module) -> _Running:
    found = _running.get(model)
    if found is None:
        raise InputError(
            f"this {type(model).__name__} is not compiled: call planner.compile(model) first"
        )
    return found


def name_of(model: nn.Module) -> str:
    """What a loaded model is called: the last part of where it was loaded from."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "model")
    return name.rstrip("/").rpartition("/")[2] or "model"


def compile(model: Model, budget: Any = 0.65, *, plan: Plan | None = None, **options: Any) -> Model:
    """Make a stock transformers model obey a budget; returns the same model.

    Args:
        model: an image-text-to-text or causal language model with weights.
        budget: a fraction, a limit such as ``"kv=256MiB"``, or several
            (`planner.planning.budgets`).
        plan: a plan to obey instead, as loaded by `planner.plan.load_plan`.
        options: the other fields of `planner.planning.compiler.Request`: switches, utilities,
            device,
            image_tokens, text_tokens, new_tokens, batch, ...

    Raises:
        InputError: for a bad budget, plan or option; the model is left as it was.
    """
    unknown = set(options) - set(Request.__dataclass_fields__) | {"model", "budget"} & set(options)
    if unknown:
        known = sorted(set(Request.__dataclass_fields__) - {"model", "budget"})
        raise InputError(f"unknown option '{min(unknown)}': choose from {', '.join(known)}")
    known_model = _running.get(model)
    if known_model is None:
        from planner.ir.lowering import lower_model
        from planner.models.running.executor import Executor

        graph = lower_model(model, name_of(model))
        known_model = _Running(Planning(graph, Request(graph.name)), Executor(model, graph))
    graph = known_model.planning.graph
    planning = Planning(graph, Request(graph.name, **options))
    running = replace(known_model, planning=planning, active=[])
    if plan is not None:
        check_figures(plan, graph)
    chosen = planning.plan(plan if plan is not None else budget)
    running.executor.attach(chosen)
    running.active = [chosen]
    _running[model] = running
    return model


@contextmanager
def budget(model: nn.Module, value: Any) -> Iterator[Plan]:
    """Another budget, or a Plan, for a block; nothing is rebuilt. Blocks nest.

    Yields the plan. A plan is made once for every budget and then kept.
    """
    running = _of(model)
    chosen = running.planning.plan(value)
    with running.executor.using(chosen):
        running.active.append(chosen)
        try:
            yield chosen
        finally:
            running.active.pop()


def plan_of(model: nn.Module) -> Plan:
    """The plan that a compiled model obeys now."""
    return _of(model).active[-1]


def graph_of(model: nn.Module) -> Graph:
    """The Graph of a compiled model."""
    return _of(model).planning.graph


def kept_image_tokens(model: nn.Module) -> dict[int, list[int]]:
    """How many image tokens the plan that is active now kept of the last prompt.

    Returns:
        Layer of a token stage -> what was left behind it, one number a sample (a row of the batch).
        Empty before the first prompt, and where no token is dropped.
    """
    return _of(model).executor.kept_image_tokens


def restore(model: Model) -> Model:
    """Give the model back exactly as it was before `compile`."""
    _of(model).executor.detach()
    del _running[model]
    return model

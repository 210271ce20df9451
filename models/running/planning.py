"""Plans of one loaded model, by budget."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.compiler import DEFAULT_DEVICE, Request, plan_graph
from planner.planning.switches import SwitchSet

__all__ = ["Planning"]


@dataclass
class Planning:
    """Makes plans for budgets, each once.

    Attributes:
        graph: of the model.
        request: how plans are made, the budget aside.
        plans: made so far.
    """

    graph: Graph
    request: Request
    plans: dict[str, Plan] = field(default_factory=dict)

    def plan(self, value: Any) -> Plan:
        """The plan for a budget; a Plan is taken as it is.

        Raises:
            InputError: for a bad budget, one that cannot be met, or a plan of another model.
        """
        if isinstance(value, Plan):
            value.check(self.graph)
            return value
        wanted = Budget.of(value)
        key = str(wanted.describe())
        if key not in self.plans:
            self.plans[key] = self._made(wanted)
        return self.plans[key]

    def _made(self, wanted: Budget) -> Plan:
        request = self.request
        if any(limit.metric == "latency" for limit in wanted.limits) and request.device is None:
            raise InputError("a latency budget needs device=...: seconds mean nothing without one")
        switches = SwitchSet.parse(request.switches)
        device = request.device or DEFAULT_DEVICE
        return plan_graph(
            self.graph, request, wanted, switches, device, lambda name: nullcontext()
        ).plan

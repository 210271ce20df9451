"""Plans of one loaded model, by budget."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.compiler import Request, plan_graph


@dataclass
class Planning:
    """Makes plans for budgets as a request says, each once."""

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
            self.plans[key] = plan_graph(self.graph, replace(self.request, budget=wanted)).plan
        return self.plans[key]

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
        """The plan for a budget; a Plan is taken as it is, for the session to check.

        Raises:
            InputError: for a bad budget, or one that cannot be met.
        """
        if isinstance(value, Plan):
            return value
        wanted = Budget.of(value)
        key = str(wanted.describe())
        if key not in self.plans:
            self.plans[key] = plan_graph(self.graph, replace(self.request, budget=wanted)).plan
        return self.plans[key]

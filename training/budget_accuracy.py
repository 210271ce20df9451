"""Accuracy under budgets: a model measured as it is used, by a scheduler or by static plans."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from planner.ir.cost import Workload
from planner.ir.graph import Graph
from planner.models.running.skipping import obeying
from planner.models.scheduling import Scheduled
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.compiler import Request, plan_graph
from planner.planning.plan_costs import PlanCosts
from planner.planning.selectors import stages_of
from planner.training.data import Conversation
from planner.training.evaluate import evaluate

# Of a question about a scene and what stands around it, about.
TEXT_TOKENS = 16


@dataclass(frozen=True, eq=False)
class UnderBudgets:
    """One model to be measured under one budget after the other.

    Attributes:
        model: a stock image-text model.
        processor: its processor.
        graph: its Graph.
        samples: what is asked; the first turn of each.
        scheduled: decides sample by sample; None for static plans.
        request: how static plans are made, and the workload that costs are of.
        tokens: a token selector in front of everything, such as ``fastv:k=2,r=0.5``.
        batch_size: questions asked together.
    """

    model: Any
    processor: Any
    graph: Graph
    samples: Sequence[Conversation]
    scheduled: Scheduled | None = None
    request: Request = field(default_factory=lambda: Request("model", text_tokens=TEXT_TOKENS))
    tokens: str | None = None
    batch_size: int = 64

    @cached_property
    def workload(self) -> Workload:
        """Of one question."""
        request = self.request
        return Workload.default(
            self.graph, request.image_tokens, request.text_tokens, request.new_tokens
        )

    @cached_property
    def stages(self) -> tuple[TokenStage, ...]:
        """Of `tokens`."""
        load = self.workload
        return stages_of(self.tokens or "", load.image_tokens, load.image_tokens_per_run)

    def measure(self, budget: Any) -> dict[str, Any]:
        """What `evaluate` measures, and how the plans kept to the budget.

        `cost_fraction` is the mean FLOPs of a prefill under the plans, over the base model's, the
        language model alone. `violations` is how many plans were beyond the budget, `utilisation`
        the mean share of it that they used, both in the unit of the scheduler's limits.

        Raises:
            InputError: the budget cannot be met.
        """
        measured = self._scheduled(budget) if self.scheduled else self._static(budget)
        return {"budget": budget if isinstance(budget, int | float) else str(budget), **measured}

    def _evaluate(self) -> dict[str, Any]:
        return evaluate(self.model, self.processor, self.samples, self.batch_size)

    def _scheduled(self, budget: Any) -> dict[str, Any]:
        assert self.scheduled is not None
        with self.scheduled.using(budget, self.stages, self.workload):
            measured = self._evaluate()
            layout = self.scheduled.layout
            decisions = [row for taken in self.scheduled.decisions for row in taken]
        base = self.scheduled.base(self.stages)
        counted: dict[bytes, tuple[Plan, int]] = {}
        for row in decisions:
            key = row.numpy().tobytes()
            plan, times = counted.get(key) or (layout.plan(row.bool(), base), 0)
            counted[key] = (plan, times + 1)
        fractions = [(self.cost_fraction(plan), times) for plan, times in counted.values()]
        limit = layout.limit(Budget.of(budget))
        spent = [layout.spent(row.bool()) for row in decisions]
        return {
            **measured,
            "cost_fraction": sum(f * n for f, n in fractions) / len(decisions),
            "plans": len(counted),
            "violations": sum(used > limit for used in spent),
            "utilisation": layout.utilisation(spent, limit),
        }

    def _static(self, budget: Any) -> dict[str, Any]:
        plan = self.plan(budget)
        with obeying(self.model, self.graph, plan, freeze=True):
            measured = self._evaluate()
        return {
            **measured,
            "cost_fraction": plan.cost["flops"]["fraction"],
            "plans": 1,
            "violations": 0,
            "utilisation": min(plan.utilisation.values(), default=1.0),
        }

    def plan(self, budget: Any) -> Plan:
        """The static plan for a budget."""
        request = replace(self.request, tokens=self.tokens or self.request.tokens, scope="llm")
        return plan_graph(self.graph, replace(request, budget=budget)).plan

    def cost_fraction(self, plan: Plan) -> float:
        """FLOPs of a prefill under a scheduler's plan over the base model's, see `PlanCosts`."""
        return self._costs.of(plan)["flops"]["fraction"]

    @cached_property
    def _costs(self) -> PlanCosts:
        return PlanCosts(self.graph, self.workload, "llm")

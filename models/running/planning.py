"""Plans of one loaded model, by budget and by prompt."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from planner.ir.cost import Workload
from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.compiler import plan_graph, pose
from planner.planning.prompt_costs import WEIGHED, PromptCosts
from planner.planning.request import Request


@dataclass
class Planning:
    """Makes plans for budgets as a request says, each once.

    Where nobody has measured yet what switches are worth, the first budget has it done.
    """

    # Plans for prompts of so many sizes are kept.
    KEPT = 1024

    graph: Graph
    request: Request
    measuring: Callable[[Graph, Request], Request] | None = None
    plans: dict[str, Plan] = field(default_factory=dict)
    _on_prompts: OrderedDict[object, Plan] = field(default_factory=OrderedDict)
    _costs: PromptCosts | None = None

    def plan(self, value: Any) -> Plan:
        """The plan for a budget on the workload of the request.

        A Plan is taken as it is, for the session to check.

        Raises:
            InputError: for a bad budget, or one that cannot be met.
        """
        if isinstance(value, Plan):
            return value
        wanted = Budget.of(value)
        key = str(wanted.describe())
        if key not in self.plans:
            if self.measuring is not None:
                self.request = self.measuring(self.graph, replace(self.request, budget=wanted))
                self.measuring = None
            self.plans[key] = plan_graph(self.graph, replace(self.request, budget=wanted)).plan
        return self.plans[key]

    def plan_on(self, budget: Budget, prompt: Workload) -> Plan:
        """The plan for a budget on a prompt.

        Limits on FLOPs and KV bytes are kept by the best plan that milliseconds find, and by the
        optimal one on the workload of the request. Other limits take a search for every size.

        Raises:
            InputError: the budget cannot be met on this prompt.
        """
        key = str(budget.describe()), prompt
        if key not in self._on_prompts:
            self._on_prompts[key] = self._made(budget, prompt)
            if len(self._on_prompts) > self.KEPT:
                self._on_prompts.popitem(last=False)
        return self._on_prompts[key]

    def _made(self, budget: Budget, prompt: Workload) -> Plan:
        usual, load = self.plan(budget), self.request.workload(self.graph)
        sizes = ("image_tokens", "encoded_tokens", "text_tokens", "batch")
        as_usual = all(getattr(load, name) == getattr(prompt, name) for name in sizes)
        metrics = [limit.metric for limit in budget.limits]
        # Units are counted whatever the prompt is.
        if "units" in usual.utilisation or (as_usual and self.request.uniform):
            return usual
        if self.request.uniform or not set(metrics) <= set(WEIGHED):
            if as_usual:
                return usual
            request = replace(
                self.request,
                budget=budget,
                image_tokens=prompt.image_tokens or prompt.encoded_tokens,
                text_tokens=prompt.text_tokens,
                batch=prompt.batch,
            )
            return plan_graph(self.graph, request).plan
        prompt = replace(prompt, image_tokens_per_run=load.image_tokens_per_run)
        on_prompt = self._prompt_costs().on(prompt)
        fits = as_usual or usual.is_dense
        return usual if fits and on_prompt.allows(usual, budget) else on_prompt.plan(budget)

    def _prompt_costs(self) -> PromptCosts:
        """Costs on any prompt."""
        if self._costs is None:
            request = replace(self.request, budget=1.0)
            if not request.image_tokens:
                # Of a prompt without images nobody could say what dropping their tokens saves.
                per_run = int(self.graph.properties.get("image_tokens", 0))
                request = replace(request, image_tokens=per_run)
            pricing, utilities, _ = pose(self.graph, request)
            self._costs = PromptCosts(pricing, utilities, request.keep)
        return self._costs

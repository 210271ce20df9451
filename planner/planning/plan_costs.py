"""What plans cost on a prompt at hand, rather than under the workload that they were made for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from planner.ir.cost import Workload
from planner.ir.cost.conventions import convention
from planner.ir.cost.device_table import Device, device
from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.compiler import DEFAULT_DEVICE, specialised
from planner.planning.pricing import Pricing, compared
from planner.planning.selectors import AnswerTokens, parse_kv_policy, whole_selector
from planner.planning.switches import AXES, SwitchSet, with_switches


@dataclass(frozen=True, eq=False)
class PlanCosts:
    """FLOPs and KV bytes of plans for one model on one prompt, beside the base model's."""

    graph: Graph
    workload: Workload  # of the prompt, and of what was generated
    scope: str | None = None  # ``model`` or ``llm``; None for what each plan was made for

    @cached_property
    def _load(self) -> Workload:
        """The workload, with how many image tokens a run yields, which no prompt says."""
        per_run = Workload.default(self.graph).image_tokens_per_run
        return replace(self.workload, image_tokens_per_run=per_run)

    @cached_property
    def _bases(self) -> dict[str, dict[str, float]]:
        return {}

    def of(
        self, plan: Plan, kept: Mapping[int, int] | None = None, answers: int | None = None
    ) -> dict[str, dict[str, float]]:
        """What a plan costs, as a plan's own ``cost`` has it.

        `kept`: layer of a token stage -> image tokens that were really left, per sample; by default
        what the plan says, scaled to the image tokens there are. `answers`: tokens of the answer
        that a KV policy which decides about them has stored; by default the most that it may.
        """
        policy = parse_kv_policy(plan.kv) if plan.kv else None
        if isinstance(policy, AnswerTokens) and answers is not None:
            share = answers / max(self.workload.new_tokens, 1)
            plan = replace(plan, kv=str(replace(policy, max=share)))
        image_tokens = self.workload.image_tokens
        stages = []
        for stage in plan.tokens:
            planned = min(image_tokens, round(image_tokens * stage.keep / stage.of))
            left = (kept or {}).get(stage.layer, planned)
            stages.append(replace(stage, keep=left, of=image_tokens))
        scope = self.scope or str(plan.provenance.get("scope", "model"))
        # No metric here depends on the device.
        chip = device(DEFAULT_DEVICE)
        if scope not in self._bases:
            dense = Plan.of(self.graph)
            pricing = pricing_for(dense, self.graph, self._load, scope, chip)
            self._bases[scope] = pricing.cost_of(dense)
        pricing = pricing_for(plan, self.graph, self._load, scope, chip)
        costs = pricing.cost_of(replace(plan, tokens=tuple(stages)))
        return compared(costs, self._bases[scope], ("flops", "kv"))

    def of_all(self, plans: Sequence[Plan]) -> dict[str, dict[str, float]]:
        """What plans cost that each serve as many samples of the workload's batch."""
        if len(plans) == 1:
            return self.of(plans[0])
        load = replace(self.workload, batch=self.workload.batch // len(plans))
        if load.encoder_flops is not None:
            load = replace(load, encoder_flops=load.encoder_flops // len(plans))
        each = [replace(self, workload=load).of(plan) for plan in plans]
        sums = [
            {metric: sum(cost[metric][which] for cost in each) for metric in each[0]}
            for which in ("plan", "base")
        ]
        return compared(sums[0], sums[1], each[0])


def published_cost(
    name: str, graph: Graph, plan: Plan, load: Workload, chip: Device, more_tokens: int = 0
) -> dict[str, dict[str, float]]:
    """What a plan's prefill costs as published tables count, as a plan's own ``cost`` has it.

    `name` is a convention's, such as ``llm-viewer``; `chip` gives modelled seconds, where it has
    any; the plan's prompt has `more_tokens` of text beside the load's. InputError where the model
    is outside the convention.
    """
    how, costs = convention(name), []
    for one, text in ((plan, load.text_tokens + more_tokens), (Plan.of(graph), load.text_tokens)):
        narrowed = specialised(graph, one)
        kept = {stage.layer: min(stage.keep, load.image_tokens) for stage in one.tokens}
        tokens = how.tokens(narrowed, replace(load, text_tokens=text), kept)
        cost = how.cost(narrowed, tokens, chip if how.has_seconds else None, load.batch)
        costs.append({"flops": cost.flops} | ({"latency": cost.seconds} if how.has_seconds else {}))
    return compared(costs[0], costs[1], costs[0])


def pricing_for(plan: Plan, graph: Graph, workload: Workload, scope: str, chip: Device) -> Pricing:
    """The cost model for what a plan switches."""
    switches = SwitchSet("of a plan", AXES, token_layers=tuple(s.layer for s in plan.tokens))
    if plan.tokens:
        first = plan.tokens[0]
        switches = replace(switches, token_selector=first.selector, selector=whole_selector(first))
    if plan.kv:
        switches = switches.with_kv_policy(plan.kv)
    return Pricing(with_switches(graph), workload, switches, chip, scope)

"""What a plan costs on a prompt at hand, rather than under the workload that it was made for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.compiler import DEFAULT_DEVICE
from planner.planning.pricing import Pricing, compared
from planner.planning.selectors import selector_of
from planner.planning.switches import AXES, SwitchSet, with_switches

__all__ = ["cost_on"]


def cost_on(
    graph: Graph, plan: Plan, workload: Workload, kept: Mapping[int, int] | None = None
) -> dict[str, dict[str, float]]:
    """FLOPs and KV bytes of a plan, as a plan's own ``cost`` has them.

    Args:
        graph: that the plan is for.
        plan: any.
        workload: of the prompt, and of what was generated.
        kept: layer of a token stage -> image tokens that were really left, per sample. By default
            what the plan says, scaled to the image tokens there are.
    """
    stages = tuple(
        replace(stage, keep=count, of=workload.image_tokens)
        for stage, count in (
            (stage, (kept or {}).get(stage.layer, _scaled(stage.keep, stage.of, workload)))
            for stage in plan.tokens
        )
    )
    chip = device(str(plan.provenance.get("device", DEFAULT_DEVICE)))
    scope = str(plan.provenance.get("scope", "model"))
    graph = with_switches(graph)
    as_planned = Pricing(graph, workload, _switches(plan), chip, scope)
    dense = Pricing(graph, workload, SwitchSet("none", ()), chip, scope)
    costs = as_planned.cost_of(replace(plan, tokens=stages))
    base = dense.cost_of(Plan(plan.model, plan.fingerprint, plan.layers))
    return compared(costs, base, ("flops", "kv"))


def _scaled(keep: int, of: int, workload: Workload) -> int:
    return min(workload.image_tokens, round(workload.image_tokens * keep / of))


def _switches(plan: Plan) -> SwitchSet:
    """What a plan switches, as pricing wants to know it."""
    switches = SwitchSet("of a plan", AXES, token_layers=tuple(s.layer for s in plan.tokens))
    if plan.tokens:
        first = plan.tokens[0]
        switches = replace(switches, token_selector=first.selector, selector=selector_of(first))
    return switches.with_kv_policy(plan.kv) if plan.kv else switches

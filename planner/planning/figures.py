"""What a plan's file states, held against what is computed: costs, use of limits, gap."""

from __future__ import annotations

import math
from collections.abc import Mapping

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device, devices
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.compiler import DEFAULT_DEVICE
from planner.planning.plan_costs import pricing_for
from planner.planning.pricing import COUNTED, Pricing, compared
from planner.planning.request import SCOPES
from planner.solver import TOLERANCE

# Of figures that are computed again and went through a file.
_RELATIVE = 1e-9
# Limits are whole numbers of FLOPs, picoseconds or bytes, and budgets are stated in 12 digits.
_UNITS = 2


def check_figures(plan: Plan, graph: Graph) -> None:
    """Hold what a plan's file states against what is computed from the graph; InputError where it
    differs.

    Costs, base costs, fractions and utilisations are priced again for the workload that the plan
    was made for; its limits must hold, and its gap must follow from its bound. What a plan does not
    state is not checked, nor are seconds on a measured device, whose file may be elsewhere or new.
    """
    plan.check(graph)
    facts = plan.provenance
    workload = Workload.stated(graph, facts)
    if plan.cost and workload is not None:
        as_planned, dense = _pricings(graph, plan, workload)
        costs = as_planned.cost_of(plan)
        known = compared(costs, dense.base, costs)
        for metric, stated in plan.cost.items():
            if metric not in known:
                raise InputError(f"the plan states a cost in {metric}, which is no metric")
            if metric == "latency" and _is_measured(plan):
                continue
            for name, value in known[metric].items():
                _compare(f"{metric} ({name})", stated.get(name, math.nan), value)
        # Where switches are counted, the budget is no limit on a cost.
        if "units" not in plan.utilisation:
            _check_limits(plan, dense, costs)
    _check_proof(plan)


def _compare(what: str, stated: float, computed: float) -> None:
    if not math.isclose(stated, computed, rel_tol=_RELATIVE):
        raise InputError(
            f"the plan states {stated:.12g} for {what}, and it is {computed:.12g}: compile it again"
        )


def _check_limits(plan: Plan, dense: Pricing, costs: Mapping[str, float]) -> None:
    """The plan's costs keep to its budget, and use as much of it as the plan says."""
    if not plan.budget:
        return
    stated = [
        f"{metric}={str(limit).removesuffix(' of base')}" for metric, limit in plan.budget.items()
    ]
    for metric, limit in dense.limits(Budget.of(stated)).items():
        if metric == "latency" and _is_measured(plan):
            continue
        cost = costs[metric] * COUNTED[metric]
        if cost > limit * (1 + _RELATIVE) + _UNITS:
            raise InputError(f"the plan exceeds its budget, {metric} {plan.budget[metric]}")
        used = plan.utilisation.get(metric)
        if used is not None and abs(used * limit - cost) > _UNITS + _RELATIVE * cost:
            raise InputError(
                f"the plan states that it uses {used:.12g} of its {metric} limit, and it uses "
                f"{cost / max(limit, 1):.12g}: compile it again"
            )


def _check_proof(plan: Plan) -> None:
    """The gap follows from utility and bound, and says whether the plan is optimal."""
    names = ("utility", "bound", "gap")
    if any(name not in plan.solver for name in names):
        return
    figures = [plan.solver[name] for name in names]
    numbers = all(isinstance(f, int | float) and math.isfinite(f) for f in figures)
    utility, bound, gap = figures if numbers else (1.0, 0.0, 0.0)
    # A gap is relative to the utility, or to a thousandth of all where the utility is less: which
    # happens only where measured utilities nearly cancel.
    largest = (bound - utility) / abs(utility) if utility else math.inf
    least = largest if plan.provenance.get("utilities") in ("prior", "uniform") else 0.0
    follows = least * (1 - _RELATIVE) <= gap <= largest * (1 + _RELATIVE) and bound >= utility
    if not follows or plan.solver.get("status") != ("optimal" if gap <= TOLERANCE else "feasible"):
        raise InputError("the plan's gap does not follow from its utility and bound")


def _is_measured(plan: Plan) -> bool:
    """Whether seconds are those of a device file."""
    name = str(plan.provenance.get("device", ""))
    return name not in devices() and name.endswith(".json")


def _pricings(graph: Graph, plan: Plan, workload: Workload) -> tuple[Pricing, Pricing]:
    """What prices a plan, and what prices the base model, as the plan was priced."""
    name = str(plan.provenance.get("device", DEFAULT_DEVICE))
    chip = device(DEFAULT_DEVICE if _is_measured(plan) else name)
    scope = str(plan.provenance.get("scope", "model"))
    if scope not in SCOPES:
        raise InputError(f"the plan has the scope '{scope}': it can be model or llm")
    return (
        pricing_for(plan, graph, workload, scope, chip),
        pricing_for(Plan.of(graph), graph, workload, scope, chip),
    )

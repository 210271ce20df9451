"""The optimum once more, from a plain CP-SAT model that shares nothing with `planner.solver`."""

from __future__ import annotations

from ortools.sat.python import cp_model

from planner.ir.errors import PlannerError
from planner.solver.problem import Problem

#: Utilities are rounded to this share of the largest one.
UNIT = 2.0**-40


def best_utility(problem: Problem) -> float:
    """Utility of the best choice, but for rounding to `UNIT`, where there is one token option.

    Raises PlannerError where CP-SAT proves no optimum.
    """
    model = cp_model.CpModel()
    worth: list[tuple[cp_model.IntVar, float]] = []
    spent: list[list[cp_model.LinearExprT]] = [[] for _ in problem.metrics]
    for layer in problem.layers:
        on = model.new_bool_var("") if layer.optional else model.new_constant(1)
        worth.append((on, layer.utility))
        entry = layer.costs[0] + sum(site.costs[0, :, 0] for site in layer.sites)
        for site in layer.sites:
            kept = [model.new_bool_var("") for _ in range(site.switches)]
            worth += zip(kept, site.utilities.tolist(), strict=True)
            count = model.new_int_var(0, site.switches, "")
            model.add(count == sum(kept))
            model.add(count >= site.minimum * on)
            model.add(count <= site.switches * on)
            for metric, table in enumerate(site.costs[0]):
                above = (table - table[0]).tolist()
                cost = model.new_int_var(0, above[-1], "")
                model.add_element(count, above, cost)
                spent[metric].append(cost)
        for metric, price in enumerate(entry.tolist()):
            spent[metric].append(price * on)
    outside, limits = problem.tokens[0].costs.tolist(), problem.limits.tolist()
    for terms, fixed, limit in zip(spent, outside, limits, strict=True):
        model.add(sum(terms) + fixed <= limit)
    unit = max((abs(value) for _, value in worth), default=0.0) * UNIT or 1.0
    scaled = [round(value / unit) for _, value in worth]
    model.maximize(cp_model.LinearExpr.weighted_sum([flag for flag, _ in worth], scaled))
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    if solver.solve(model) != cp_model.OPTIMAL:
        raise PlannerError("CP-SAT did not solve a label's problem to the end")
    return float(solver.objective_value) * unit + problem.tokens[0].utility

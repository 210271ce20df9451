"""Solve a core with OR-Tools' CP-SAT.

One worker and a fixed seed: the same core gives the same answer. Costs and utilities go in as they
are, divided by their greatest common divisors, so nothing is lost to scaling.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from ortools.sat.python import cp_model

from planner.solver.branch import Assignment, Ints
from planner.solver.core import Core

__all__ = ["CoreAnswer", "solve_core"]


@dataclass(frozen=True)
class CoreAnswer:
    """What the search of a core came to.

    Attributes:
        assignment: the best found, if any was.
        bound: no assignment of the core is worth more; `target` - 1 at least.
        finished: whether `assignment` is the best, or, where it is None, none reaches the target.
    """

    assignment: Assignment | None
    bound: int
    finished: bool


def solve_core(
    core: Core, target: int, ceiling: int, seconds: float, effort: float = math.inf
) -> CoreAnswer:
    """The best assignment of a core that is worth at least `target`.

    Args:
        core: the core.
        target: utilities below it are of no interest.
        ceiling: an upper bound on the utility of the core's assignments.
        seconds: wall-clock limit.
        effort: limit in CP-SAT's deterministic time, which is the same on every machine.
    """
    if (core.room < 0).any():
        return CoreAnswer(None, target - 1, True)
    unit = _common_divisor(core.utility)
    base = core.base.utility
    low, high = -((base - target) // unit), (ceiling - base) // unit
    if low > high:
        return CoreAnswer(None, target - 1, True)

    model = cp_model.CpModel()
    upper = core.upper.tolist()
    columns = [model.new_int_var(0, largest, "") for largest in upper]
    for column, needed in core.order:
        model.add(upper[needed] * columns[column] <= upper[column] * columns[needed])
    for cost, room in zip(core.cost, core.room.tolist()):
        divisor = _common_divisor(cost)
        weights = (cost // divisor).tolist()
        model.add(cp_model.LinearExpr.weighted_sum(columns, weights) <= room // divisor)
    worth = cp_model.LinearExpr.weighted_sum(columns, (core.utility // unit).tolist())
    model.add_linear_constraint(worth, low, high)
    model.maximize(worth)

    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    solver.parameters.max_time_in_seconds = max(seconds, 0.0)
    solver.parameters.max_deterministic_time = effort
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return CoreAnswer(None, target - 1, True)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return CoreAnswer(None, max(ceiling, target - 1), False)
    found = core.assignment([solver.value(column) for column in columns])
    if status == cp_model.OPTIMAL:
        return CoreAnswer(found, max(found.utility, target - 1), True)
    bound = min(ceiling, base + unit * math.ceil(solver.best_objective_bound))
    return CoreAnswer(found, max(found.utility, target - 1, bound), False)


def _common_divisor(values: Ints) -> int:
    return max(int(np.gcd.reduce(values)) if len(values) else 1, 1)

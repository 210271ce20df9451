"""Solve a core with OR-Tools' CP-SAT.

One worker and a fixed seed: the same core gives the same answer. Costs and utilities go in as they
are, divided by their greatest common divisors, so nothing is lost to scaling.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from itertools import count
from typing import Any

import numpy as np
from ortools.sat.python import cp_model

from planner.solver.branch import Assignment
from planner.solver.core import ALWAYS_OFF, Core
from planner.solver.problem import Ints


@dataclass(frozen=True)
class CoreAnswer:
    """What the search of a core came to."""

    assignment: Assignment | None  # the best found, if any was
    bound: int  # no assignment of the core is worth more; `target` - 1 at least
    finished: bool  # `assignment` is the best or, where it is None, none reaches the target


# What works at once on one core takes minutes on another, and none of these ways wins everywhere:
# each in turn gets some effort, then each four times as much, and so on.
_STRATEGIES: tuple[dict[str, Any], ...] = (
    {"search_branching": cp_model.PORTFOLIO_WITH_QUICK_RESTART_SEARCH},
    {"optimize_with_lb_tree_search": True},
    {"use_objective_lb_search": True},
)
_FIRST_EFFORT = 0.5
_MORE_EFFORT = 4.0


def solve_core(
    core: Core, target: int, ceiling: int, seconds: float, rounds: int | None = None
) -> CoreAnswer:
    """The best assignment of a core that is worth at least `target`.

    `ceiling` bounds the utility of all of the core's assignments that fit. The strategies are gone
    through so many `rounds`, or else until time is up.
    """
    deadline = time.perf_counter() + seconds
    if (core.room < 0).any():
        return CoreAnswer(None, target - 1, True)
    losses = np.array([loss for *_, loss in core.pairs], dtype=np.int64)
    unit = _common_divisor(np.concatenate([core.utility, losses]))
    base = core.base.utility
    most = int(core.upper @ np.maximum(core.utility, 0))
    most += int(np.abs(losses).sum())
    low, high = -((base - target) // unit), min(ceiling - base, most) // unit
    if low > high:
        return CoreAnswer(None, target - 1, True)
    model, columns, worth = _model(core, unit)
    model.add_linear_constraint(worth, low, high)

    best: Assignment | None = None
    effort = _FIRST_EFFORT
    for turn in count() if rounds is None else range(rounds * len(_STRATEGIES)):
        left = deadline - time.perf_counter()
        if left <= 0:
            break
        solver = _solver(_STRATEGIES[turn % len(_STRATEGIES)], left, effort)
        status = solver.solve(model)
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            best = core.assignment([solver.value(column) for column in columns])
            model.add(worth >= (best.utility - base) // unit + 1)
            high = min(high, math.floor(solver.best_objective_bound))
        if status in (cp_model.OPTIMAL, cp_model.INFEASIBLE):
            return CoreAnswer(best, target - 1 if best is None else best.utility, True)
        if (turn + 1) % len(_STRATEGIES) == 0:
            effort *= _MORE_EFFORT
    return CoreAnswer(best, max(base + unit * high, target - 1), False)


def _model(
    core: Core, unit: int
) -> tuple[cp_model.CpModel, list[cp_model.IntVar], cp_model.LinearExpr]:
    """The core as a model, its columns as variables, and their worth in `unit`."""
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
    # All columns are off in `base`, so every pair falls due there.
    for one, other, loss in core.pairs:
        both = _both_off(model, columns, one, other, loss)
        worth = worth + (loss // unit) * (1 - both)
    model.maximize(worth)
    return model, columns, worth


def _both_off(
    model: cp_model.CpModel, columns: list[cp_model.IntVar], one: int, other: int, loss: int
) -> cp_model.LinearExprT:
    """1 where two units are off; constrained only on the side that the objective would exceed."""
    off = [1 - columns[unit] for unit in sorted({one, other} - {ALWAYS_OFF})]
    if len(off) < 2:
        return off[0] if off else 1
    both = model.new_bool_var("")
    if loss > 0:
        model.add(both >= off[0] + off[1] - 1)
    else:
        for unit in off:
            model.add(both <= unit)
    return both


def _solver(strategy: dict[str, Any], seconds: float, effort: float) -> cp_model.CpSolver:
    solver = cp_model.CpSolver()
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = 0
    # The linear relaxation of a core is nearly tight: always keep all of it.
    solver.parameters.linearization_level = 2
    solver.parameters.max_time_in_seconds = seconds
    solver.parameters.max_deterministic_time = effort
    for name, value in strategy.items():
        setattr(solver.parameters, name, value)
    return solver


def _common_divisor(values: Ints) -> int:
    return max(int(np.gcd.reduce(values)) if len(values) else 1, 1)

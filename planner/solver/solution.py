"""What a solver hands back: a choice with its certificate, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from planner.ir.errors import InputError
from planner.solver.branch import Assignment, Scale, Tables
from planner.solver.problem import Choice, Costs, Problem, TokenOption
from planner.solver.reach import within_reach

#: An answer is called optimal if its gap, rounding of utilities included, is at most this.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Solution:
    """A feasible choice, and how far at most it is from the best one."""

    choice: Choice
    utility: float  # of the choice
    bound: float  # no feasible choice has a larger utility
    gap: float  # (bound - utility) / max(|utility|, `Scale.negligible`)
    status: Literal["optimal", "feasible"]  # optimal where the gap is at most `TOLERANCE`
    cost: Mapping[str, int]  # metric -> cost of the choice
    seconds: float = field(compare=False)  # of the search

    @property
    def facts(self) -> dict[str, float | str]:
        """What a plan says of it."""
        return {name: getattr(self, name) for name in ("status", "utility", "bound", "gap")}


class Infeasible(InputError):
    """No choice respects the limits; the message says what would have to be allowed."""


def listed(metrics: Sequence[str], values: Costs) -> str:
    """``flops 12, kv 4``, for messages."""
    return ", ".join(f"{metric} {value}" for metric, value in zip(metrics, values.tolist()))


def deadline_after(begin: float, time_limit_seconds: float) -> float:
    """When a search ends that began at `begin`, on `time.perf_counter`'s clock; InputError where
    the limit is negative or no number."""
    if not time_limit_seconds >= 0:
        raise InputError(f"a time limit is 0 seconds or more, not {time_limit_seconds}")
    return begin + time_limit_seconds


def feasible_options(problem: Problem) -> list[int]:
    """The token options with at least one feasible choice; Infeasible where there is none."""
    costs = problem.smallest_costs()
    return within_limits(problem.metrics, problem.limits, costs, problem.tokens)


def within_limits(
    metrics: Sequence[str], limits: Costs, costs: Costs, tokens: Sequence[TokenOption]
) -> list[int]:
    """The token options whose cheapest choice, of costs (token options, metrics), respects all
    limits.

    Infeasible where there is none.
    """
    options: list[int] = np.flatnonzero((costs <= limits).all(axis=1)).tolist()
    if options:
        return options
    smallest = costs.min(axis=0).tolist()
    parts = [
        f"{metric} is limited to {limit}, and the smallest possible is {least}"
        for metric, limit, least in zip(metrics, limits.tolist(), smallest)
        if least > limit
    ]
    if parts:
        raise Infeasible("the limits cannot be met: " + "; ".join(parts))
    closest = int((costs / np.maximum(limits, 1)).max(axis=1).argmin())
    raise Infeasible(
        f"each limit can be met alone but not all together ({listed(metrics, limits)}): "
        f"the closest is to keep {tokens[closest].keep} image tokens, which needs at least "
        f"{listed(metrics, costs[closest])}"
    )


def certify(
    tables: Tables, option: int, assignment: Assignment, bound: int, seconds: float
) -> Solution:
    """A Solution, its totals recomputed from the problem itself.

    The assignment is of the option's branch and must fit; `bound` is an upper bound on every
    feasible assignment, in the integer units of `tables`.
    """
    problem = tables.problem
    choice = tables.choice(option, assignment)
    if not problem.is_feasible(choice):
        raise AssertionError("the solver made a choice that breaks a limit: this is a bug")
    cost = dict(zip(problem.metrics, problem.cost(choice).tolist()))
    # Of what fits the problem's own limits, which may be lower than those of the tables.
    negligible = Scale.of(within_reach(problem)).negligible
    utility = problem.utility(choice)
    return certified(tables.scale, choice, utility, bound, cost, negligible, seconds)


def best_of(problem: Problem, solutions: Sequence[Solution]) -> Solution:
    """The best of solutions of problems that together are this one: each has some of its choices,
    and all of them have all that count."""
    best = max(solutions, key=lambda one: one.utility)
    bound = max(one.bound for one in solutions)
    negligible = Scale.of(within_reach(problem)).negligible
    gap = (bound - best.utility) / max(abs(best.utility), negligible)
    return Solution(
        choice=best.choice,
        utility=best.utility,
        bound=bound,
        gap=gap,
        status="optimal" if gap <= TOLERANCE else "feasible",
        cost=best.cost,
        seconds=sum(one.seconds for one in solutions),
    )


def certified(
    scale: Scale,
    choice: Choice,
    utility: float,
    bound: int,
    cost: Mapping[str, int],
    negligible: float,
    seconds: float,
) -> Solution:
    """The same of a choice that is known to fit, to be worth so much and to cost so much by metric.

    `negligible`: see `Scale`.
    """
    upper = max(scale.real(bound + scale.slack), utility)
    gap = (upper - utility) / max(abs(utility), negligible)
    return Solution(
        choice=choice,
        utility=utility,
        bound=upper,
        gap=gap,
        status="optimal" if gap <= TOLERANCE else "feasible",
        cost=cost,
        seconds=seconds,
    )

"""What a solver hands back: a choice with its certificate, or why there is none."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from planner.ir.errors import InputError
from planner.solver.branch import Assignment, Scale, Tables
from planner.solver.problem import Choice, Problem
from planner.solver.reach import within_reach

#: An answer is called optimal if its gap, rounding of utilities included, is at most this.
TOLERANCE = 1e-9


@dataclass(frozen=True)
class Solution:
    """A feasible choice, and how far at most it is from the best one.

    Attributes:
        choice: the answer.
        utility: of the choice, recomputed from the problem.
        bound: no feasible choice has a larger utility.
        gap: (bound - utility) / max(|utility|, `Scale.negligible`).
        status: ``optimal`` where the gap is at most `TOLERANCE`, else ``feasible``.
        cost: metric -> cost of the choice, recomputed from the problem.
        seconds: wall-clock time of the search; not part of equality.
    """

    choice: Choice
    utility: float
    bound: float
    gap: float
    status: Literal["optimal", "feasible"]
    cost: Mapping[str, int]
    seconds: float = field(compare=False)


class Infeasible(InputError):
    """No choice respects the limits.

    Attributes:
        smallest: metric -> smallest value its limit could have. Of every metric whose limit is too
            low on its own; or, where limits conflict only together, what the token option that
            comes closest needs of the metrics it exceeds.
    """

    def __init__(self, message: str, smallest: Mapping[str, int]) -> None:
        super().__init__(message)
        self.smallest = dict(smallest)


def deadline_after(begin: float, time_limit_seconds: float) -> float:
    """When a search ends that began at `begin`, on `time.perf_counter`'s clock.

    Raises:
        InputError: the limit is negative or no number.
    """
    if not time_limit_seconds >= 0:
        raise InputError(f"a time limit is 0 seconds or more, not {time_limit_seconds}")
    return begin + time_limit_seconds


def feasible_options(problem: Problem) -> list[int]:
    """The token options with at least one feasible choice.

    Raises:
        Infeasible: if there is none.
    """
    costs, limits = problem.smallest_costs(), problem.limits
    options: list[int] = np.flatnonzero((costs <= limits).all(axis=1)).tolist()
    if options:
        return options
    smallest = costs.min(axis=0)
    if (smallest > limits).any():
        short = {
            metric: int(value)
            for metric, value, limit in zip(problem.metrics, smallest, limits)
            if value > limit
        }
        parts = [
            f"{metric} is limited to {limit}, and the smallest possible is {short[metric]}"
            for metric, limit in zip(problem.metrics, limits.tolist())
            if metric in short
        ]
        raise Infeasible("the limits cannot be met: " + "; ".join(parts), short)
    excess = (costs / np.maximum(limits, 1)).max(axis=1)
    closest = int(excess.argmin())
    needs = dict(zip(problem.metrics, costs[closest].tolist()))
    listed = ", ".join(f"{metric} {value}" for metric, value in needs.items())
    limited = ", ".join(f"{m} {limit}" for m, limit in zip(problem.metrics, limits.tolist()))
    raise Infeasible(
        f"each limit can be met alone but not all together ({limited}): the closest is to keep "
        f"{problem.tokens[closest].keep} image tokens, which needs at least {listed}",
        {m: v for m, v, limit in zip(needs, needs.values(), limits.tolist()) if v > limit},
    )


def certify(
    tables: Tables, option: int, assignment: Assignment, bound: int, seconds: float
) -> Solution:
    """A Solution, its totals recomputed from the problem itself.

    Args:
        tables: of the problem.
        option: the token option.
        assignment: of that option's branch; it must fit.
        bound: in the integer units of `tables`, an upper bound on every feasible assignment.
        seconds: what the search took.
    """
    problem, scale = tables.problem, tables.scale
    choice = tables.choice(option, assignment)
    if not problem.is_feasible(choice):
        raise AssertionError("the solver made a choice that breaks a limit: this is a bug")
    utility = problem.utility(choice)
    certified = max(scale.real(bound + scale.slack), utility)
    # Of what fits the problem's own limits, which may be lower than those of the tables.
    negligible = Scale.of(within_reach(problem)).negligible
    gap = (certified - utility) / max(abs(utility), negligible)
    return Solution(
        choice=choice,
        utility=utility,
        bound=certified,
        gap=gap,
        status="optimal" if gap <= TOLERANCE else "feasible",
        cost=dict(zip(problem.metrics, problem.cost(choice).tolist())),
        seconds=seconds,
    )

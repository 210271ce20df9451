"""Every label against the proven optimum of its own problem."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from planner.audit.crosscheck import best_utility
from planner.audit.heuristic import worth
from planner.audit.label_file import Labels
from planner.ir.graph import Graph
from planner.progress import Progress
from planner.solver import TOLERANCE, solve
from planner.solver.problem import Choice, Flags, Floats, Problem
from planner.spread import Here, Spread, in_order

# Of one solve.
_SECONDS = 5.0


@dataclass(frozen=True, eq=False)
class Verdict:
    """What an audit found of one label."""

    feasible: bool  # whether the plan keeps to the limit, by costs priced afresh
    priced_right: bool  # whether cost and limit in the file are those priced afresh
    utilisation: float  # cost over limit; 1 for a limit of 0
    best_utilisation: float  # of the optimum
    utility: float  # of the plan
    optimum: float  # utility of the best plan within the limit
    proven: bool  # whether the solver proved it
    best: Flags  # the optimum
    dominating: Flags | None  # a plan that is worth more and costs no more, if there is one
    cost: int
    dominating_cost: int
    dominating_utility: float
    exact: float | None  # utility of the optimum by `planner.audit.crosscheck`, if asked for
    seconds: float  # what the audit of this label took

    @property
    def lost(self) -> float:
        """Utility that the label leaves, in nats per answer token; 0 where it is infeasible."""
        return max(self.optimum - self.utility, 0.0) if self.feasible else 0.0

    @property
    def gap(self) -> float:
        """What the label leaves, as a share of the optimum's utility (or of its own if larger)."""
        scale = max(abs(self.optimum), abs(self.utility))
        return self.lost / scale if scale else 0.0


def judge(
    labels: Labels,
    graph: Graph,
    *,
    exact: bool = False,
    spread: Spread[None] | None = None,
    progress: Progress = lambda done, total: None,
) -> list[Verdict]:
    """Solve every label's problem, priced afresh from the graph of their model, and compare.

    With `exact` each is solved once more, by a plain CP-SAT model. `spread` says where; None is
    here. InputError where the labels are not for this graph, Infeasible where no plan keeps to a
    budget.
    """
    recorded = zip(labels.costs.tolist(), labels.limits.tolist(), strict=True)
    rows = zip(labels.budgets.tolist(), labels.utilities, labels.plans, recorded, strict=True)
    make = partial(_judge_of, labels.problems(graph), exact)
    return in_order(spread or Here(None), make, list(rows), progress)


# A label: budget, utilities, plan, and its cost and limit as recorded.
_Row = tuple[float, Floats, Flags, tuple[int, int]]


def _judge_of(
    problems: Mapping[float, Problem], exact: bool, loaded: None
) -> Callable[[_Row], Verdict]:
    """Judges labels of these problems, one by one."""

    def judge_row(row: _Row) -> Verdict:
        budget, utilities, plan, recorded = row
        return _judge(problems[budget].with_utilities(worth(utilities)), plan, recorded, exact)

    return judge_row


def _judge(problem: Problem, flags: Flags, recorded: tuple[int, int], exact: bool) -> Verdict:
    begin = time.perf_counter()
    label = problem.choice_of(flags)
    cost, limit = int(problem.cost(label)[0]), int(problem.limits[0])
    feasible, utility = problem.is_feasible(label), problem.utility(label)
    solution = solve(problem, time_limit_seconds=_SECONDS, hint=label)
    # What is best within the limit is not dominated; beyond it, nothing is compared.
    settled = not feasible or _equal(solution.utility, utility)
    better = None if settled else _dominating(problem, label, cost, utility)
    used = solution.cost[problem.metrics[0]]
    return Verdict(
        feasible=feasible,
        priced_right=recorded == (cost, limit),
        utilisation=cost / limit if limit else 1.0,
        best_utilisation=used / limit if limit else 1.0,
        utility=utility,
        optimum=solution.utility,
        proven=solution.status == "optimal",
        best=problem.flags_of(solution.choice),
        dominating=None if better is None else problem.flags_of(better),
        cost=cost,
        dominating_cost=cost if better is None else int(problem.cost(better)[0]),
        dominating_utility=utility if better is None else problem.utility(better),
        exact=best_utility(problem) if exact else None,
        seconds=time.perf_counter() - begin,
    )


def _dominating(problem: Problem, label: Choice, cost: int, utility: float) -> Choice | None:
    """A plan that is worth more than the label, which is feasible, and costs no more."""
    tighter = replace(problem, limits=np.array([cost], dtype=np.int64))
    found = solve(tighter, time_limit_seconds=_SECONDS, hint=label)
    return None if _equal(found.utility, utility) else found.choice


def _equal(optimum: float, utility: float) -> bool:
    """Whether a utility is the optimum, but for rounding."""
    return optimum - utility <= TOLERANCE * max(abs(optimum), abs(utility))

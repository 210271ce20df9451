"""Every label against the proven optimum of its own problem."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from planner.audit.crosscheck import best_utility
from planner.audit.heuristic import worth
from planner.audit.label_file import Labels
from planner.ir.graph import Graph
from planner.solver import TOLERANCE, solve
from planner.solver.problem import Choice, Flags, Problem


@dataclass(frozen=True, eq=False)
class Verdict:
    """What an audit found of one label.

    Attributes:
        feasible: whether the plan keeps to the limit, by costs priced afresh.
        priced_right: whether cost and limit in the file are those priced afresh.
        utilisation: cost over limit; 1 for a limit of 0.
        best_utilisation: of the optimum.
        utility: of the plan.
        optimum: utility of the best plan within the limit.
        proven: whether the solver proved it.
        best: the optimum's flags.
        dominating: flags of a plan that is worth more and costs no more, if there is one.
        cost: of the plan.
        dominating_cost: of that plan.
        dominating_utility: of that plan.
        exact: utility of the optimum by `planner.audit.crosscheck`, where asked for.
        seconds: what the audit of this label took.
    """

    feasible: bool
    priced_right: bool
    utilisation: float
    best_utilisation: float
    utility: float
    optimum: float
    proven: bool
    best: Flags
    dominating: Flags | None
    cost: int
    dominating_cost: int
    dominating_utility: float
    exact: float | None
    seconds: float

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
    time_limit_seconds: float = 5.0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Verdict]:
    """Solve every label's problem and compare.

    Args:
        labels: what to judge.
        graph: of their model; costs and limits are priced afresh from it.
        exact: solve each once more, with a plain CP-SAT model.
        time_limit_seconds: of one solve.
        progress: called with the number of labels done, and of all.

    Raises:
        InputError: the labels are not for this graph.
        Infeasible: a budget that no plan keeps to.
    """
    problems = labels.problems(graph)
    verdicts = []
    for index, budget in enumerate(labels.budgets.tolist()):
        problem = problems[budget].with_utilities(worth(labels.utilities[index]))
        recorded = int(labels.costs[index]), int(labels.limits[index])
        verdicts.append(_judge(problem, labels.plans[index], recorded, exact, time_limit_seconds))
        progress(index + 1, len(labels))
    return verdicts


def _judge(
    problem: Problem, flags: Flags, recorded: tuple[int, int], exact: bool, seconds: float
) -> Verdict:
    begin = time.perf_counter()
    label = problem.choice_of(flags)
    cost, limit = int(problem.cost(label)[0]), int(problem.limits[0])
    feasible, utility = problem.is_feasible(label), problem.utility(label)
    solution = solve(problem, time_limit_seconds=seconds, hint=label)
    # What is best within the limit is not dominated; beyond it, nothing is compared.
    settled = not feasible or _equal(solution.utility, utility)
    better = None if settled else _dominating(problem, label, cost, utility, seconds)
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


def _dominating(
    problem: Problem, label: Choice, cost: int, utility: float, seconds: float
) -> Choice | None:
    """A plan that is worth more than the label, which is feasible, and costs no more."""
    tighter = replace(problem, limits=np.array([cost], dtype=np.int64))
    found = solve(tighter, time_limit_seconds=seconds, hint=label)
    return None if _equal(found.utility, utility) else found.choice


def _equal(optimum: float, utility: float) -> bool:
    """Whether a utility is the optimum, but for rounding."""
    return optimum - utility <= TOLERANCE * max(abs(optimum), abs(utility))

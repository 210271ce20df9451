"""The exact solver: the best choice of a Problem, with a proof."""

from __future__ import annotations

import time
from functools import partial

from planner.solver.branch import Tables
from planner.solver.problem import Choice, Problem
from planner.solver.search import Candidate, Search
from planner.solver.solution import Solution, certify, deadline_after, feasible_options


def solve(
    problem: Problem, *, time_limit_seconds: float = 20.0, hint: Choice | None = None
) -> Solution:
    """Maximise utility within all limits; after the time limit the best choice so far, with its
    bound.

    The same problem gives the same answer, unless the time limit cuts the search short. `hint`: a
    choice to start from, for example a scheduler's; ignored if it is not feasible. InputError where
    the problem's tables are inconsistent, or the time limit is none; Infeasible where no choice
    respects the limits.
    """
    begin = time.perf_counter()
    deadline = deadline_after(begin, time_limit_seconds)
    problem.check()
    options = feasible_options(problem)
    tables = Tables(problem)
    candidates = [
        Candidate(tables.optimistic(option), partial(tables.branch, option)) for option in options
    ]
    start = None
    if hint is not None and problem.is_feasible(hint):
        start = options.index(hint.token_option), tables.assignment(hint)
    outcome = Search(candidates, deadline, start).run()
    option = options[outcome.index]
    seconds = time.perf_counter() - begin
    return certify(tables, option, outcome.assignment, outcome.bound, seconds)

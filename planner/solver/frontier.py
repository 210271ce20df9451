"""Answers for any limit of one metric in milliseconds, each with a certified gap.

Built once: the merged concave frontier of every token option (`hull`). A limit's Lagrangian bound
and the choice behind it are then read off, and what is left of the limit is filled by the moves
that also start the exact solver. The limits of other metrics hold, but stay out of the bound, so
where they bind the certified gap is wide.
"""

from __future__ import annotations

import copy
import time
from dataclasses import replace

import numpy as np

from planner.ir.errors import InputError
from planner.solver.branch import Assignment, Tables
from planner.solver.hull import Hull
from planner.solver.problem import COST_CEILING, Costs, Problem
from planner.solver.relaxation import relax
from planner.solver.rounding import improve
from planner.solver.solution import Solution, certify, feasible_options

# How many token options, best bound first, are tried for one answer.
_TRIED = 3


class Frontier:
    """The frontier of a problem in one metric, whose limit in the problem is not used.

    Raises:
        InputError: the problem's tables are inconsistent, or it has no such metric.
    """

    def __init__(self, problem: Problem, metric: str) -> None:
        problem.check()
        if not problem.is_additive:
            raise InputError("the problem counts pairs, which a frontier does not")
        if metric not in problem.metrics:
            known = ", ".join(problem.metrics)
            raise InputError(f"the problem has no metric {metric!r}, only {known}")
        self._metric = problem.metrics.index(metric)
        limits = problem.limits.copy()
        limits[self._metric] = COST_CEILING
        self._tables = Tables(replace(problem, limits=limits))
        self._hulls = [
            Hull.of(self._tables.branch(option), self._metric)
            for option in range(len(problem.tokens))
        ]

    def at(self, limit: int) -> Solution:
        """A choice for one limit on the frontier's metric; Infeasible where there is none."""
        begin = time.perf_counter()
        tables = copy.copy(self._tables)
        limits = tables.problem.limits.copy()
        limits[self._metric] = limit
        tables.problem = replace(tables.problem, limits=limits)

        options = feasible_options(tables.problem)
        rooms = {option: limits - tables.problem.tokens[option].costs for option in options}
        bounds = {
            option: self._hulls[option].bound(int(rooms[option][self._metric]))
            for option in options
        }
        options.sort(key=lambda option: -bounds[option])
        best: tuple[int, Assignment] | None = None
        for option in options[:_TRIED]:
            if best is not None and best[1].utility >= bounds[option]:
                break
            found = self._answer(option, rooms[option])
            if best is None or found.utility > best[1].utility:
                best = option, found
        assert best is not None
        bound = max(bounds[options[0]], best[1].utility)
        return certify(tables, *best, bound, time.perf_counter() - begin)

    def _answer(self, option: int, room: Costs) -> Assignment:
        """The frontier's assignment of a token option, and the slack filled."""
        hull = self._hulls[option]
        prices = np.zeros(len(room))
        prices[self._metric] = hull.price(int(room[self._metric]))
        branch = replace(hull.branch, room=room)
        return improve(branch, hull.assignment(room), relax(branch, prices))

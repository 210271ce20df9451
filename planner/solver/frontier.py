"""Answers for any prompt and any limits in milliseconds, each with a certified gap.

What a choice costs on a prompt is a weighted sum: of terms that depend on the choice alone, by
weights that depend on the prompt alone. Built once: the merged concave frontier of every token
option (`hull`), in the order that one typical prompt gives, with all terms summed along it. On a
prompt at hand the terms are weighed, the longest stretch of each frontier that fits is read off,
and what is left of the limits is filled by the moves that also start the exact solver. A Lagrangian
bound says how far from the best that is at most.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import numpy as np

from planner.ir.errors import InputError
from planner.solver.branch import Assignment, Branch, Tables
from planner.solver.hull import Hull
from planner.solver.problem import Costs, Problem
from planner.solver.relaxation import Relaxation, relax
from planner.solver.rounding import improve
from planner.solver.solution import Solution, certified, within_limits

# How many token options, best bound first, are tried for one answer.
_TRIED = 3


@dataclass(frozen=True, eq=False)
class Prices:
    """What choices cost on one prompt, and what they may."""

    metrics: tuple[str, ...]  # names of what is limited
    limits: Costs  # (metrics,)
    weights: Costs  # (token options, metrics, terms), non-negative: of a frontier's terms
    outside: Costs  # (token options, metrics), non-negative: of all else


class Frontier:
    """The frontier of a problem whose metrics are terms, with limits so high that they do not
    count.

    `weights`: shape (token options, terms): of the terms on a typical prompt, in the metric that is
    mostly limited. InputError where the problem's tables are inconsistent.
    """

    def __init__(self, problem: Problem, weights: Costs) -> None:
        problem.check()
        if not problem.is_additive:
            raise InputError("the problem counts pairs, which a frontier does not")
        self._tables = Tables(problem)
        self._branches = [self._tables.branch(option) for option in range(len(problem.tokens))]
        self._hulls = []
        for branch, typical in zip(self._branches, weights):
            # Ordered by the typical cost, and the terms besides.
            rows = np.concatenate([typical[None], np.eye(len(typical), dtype=np.int64)])
            self._hulls.append(Hull.of(_weighed(branch, rows, np.zeros(len(rows), np.int64))))

    def at(self, prices: Prices) -> Solution:
        """A choice for one prompt; Infeasible where none respects the limits."""
        begin = time.perf_counter()
        problem = self._tables.problem
        smallest = problem.smallest_costs()[:, None] @ prices.weights.swapaxes(1, 2)
        costs = prices.outside + smallest[:, 0]
        options = within_limits(prices.metrics, prices.limits, costs, problem.tokens)
        begun = {option: self._begun(option, prices) for option in options}
        options.sort(key=lambda option: -begun[option][1].bound)
        best: tuple[int, Assignment] | None = None
        for option in options[:_TRIED]:
            branch, relaxation, taken = begun[option]
            if best is not None and best[1].utility >= relaxation.bound:
                break
            start = branch.cheapest()
            if taken >= 0:
                start = branch.assign(*self._hulls[option].first(taken))
            found = improve(branch, start, relaxation)
            if best is None or found.utility > best[1].utility:
                best = option, found
        assert best is not None
        bound = max(begun[options[0]][1].bound, best[1].utility)
        used = prices.outside[best[0]] + best[1].cost
        cost = dict(zip(prices.metrics, used.tolist()))
        negligible = self._tables.scale.negligible
        return certified(self._tables, *best, bound, cost, negligible, time.perf_counter() - begin)

    def _begun(self, option: int, prices: Prices) -> tuple[Branch, Relaxation, int]:
        """A token option on a prompt: its branch, a bound, and how much of its frontier fits.

        None of it (-1) fits where what is free on a typical prompt is too much on this one.
        """
        hull, weights = self._hulls[option], prices.weights[option]
        room = prices.limits - prices.outside[option]
        branch = _weighed(self._branches[option], weights, room)
        cost = weights @ hull.cost[1:]
        taken = int((cost <= room[:, None]).all(axis=0).cumprod().sum()) - 1
        multipliers = np.zeros(len(room))
        if 0 <= taken < len(hull.utility) - 1:
            before, after = cost[:, taken], cost[:, taken + 1]
            tight = int(np.argmax((after - room) / np.maximum(room, 1)))
            gain = float(hull.utility[taken + 1] - hull.utility[taken])
            multipliers[tight] = gain / max(float((after - before)[tight]), 1.0)
        return branch, relax(branch, multipliers), taken


def _weighed(branch: Branch, weights: Costs, room: Costs) -> Branch:
    """A branch whose metrics are terms as one of metrics.

    `weights`: shape (metrics, terms). `room`: shape (metrics,).
    """
    return replace(
        branch,
        room=room,
        layer_cost=weights @ branch.layer_cost,
        cost=np.tensordot(weights, branch.cost, 1),
    )

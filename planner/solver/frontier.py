"""Answers for any prompt and any limits in a millisecond or two, each with a certified gap.

What a choice costs on a prompt is a weighted sum: of terms that depend on the choice alone, by
weights that depend on the prompt alone. Built once: a ladder of choices for every token option
(`rungs`), with the terms of each. On a prompt at hand all of them are weighed at once. The best
that fits is filled up with switches, the most useful for their price first, and where that is not
near enough to the best, improved by moves and exchanges (`rounding`). A Lagrangian bound says how
far it is at most.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.solver.branch import Assignment, Branch, Tables
from planner.solver.option_bounds import OptionBounds
from planner.solver.problem import Costs, Floats, Problem
from planner.solver.rounding import fill, improve
from planner.solver.rungs import Rungs
from planner.solver.solution import Solution, certified, within_limits

# How many token options, best bound first, are tried for one answer.
_TRIED = 3
# An answer so near its bound, as a share of what it is worth, is near enough: under one limit, and
# under several or with pairs, where bounds are less tight and improving takes longer.
_ENOUGH, _ENOUGH_OF_SEVERAL = 1e-4, 1e-3


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

    `weights`: of the terms on a typical prompt, in all `metrics` that may be limited; shape (token
    options, metrics, terms). InputError where the problem's tables are inconsistent.
    """

    def __init__(self, problem: Problem, metrics: Sequence[str], weights: Costs) -> None:
        problem.check()
        self._metrics = tuple(metrics)
        self._tables = Tables(problem)
        self._smallest = problem.smallest_costs()
        self._branches = [self._tables.branch(option) for option in range(len(problem.tokens))]
        self._bounds = OptionBounds(self._branches, weights)
        self._rungs = Rungs.of(self._branches, weights)
        self._limited: dict[tuple[str, ...], Rungs] = {}
        # Who counts pairs is given nothing worse than who does not.
        self._alone = None
        if not problem.is_additive:
            self._alone = Frontier(problem.additive(), metrics, weights)

    def at(self, prices: Prices) -> Solution:
        """A choice for one prompt; Infeasible where none respects the limits."""
        begin = time.perf_counter()
        option, found, bound = self._found(prices)
        if self._alone is not None:
            other, alone, _ = self._alone._found(prices)
            branch = self._branches[other].weighed(prices.weights[other], found.cost)
            alone = branch.assign(alone.on, alone.counts)
            if alone.utility > found.utility:
                option, found = other, alone
        scale, used = self._tables.scale, prices.outside[option] + found.cost
        return certified(
            scale,
            self._tables.choice(option, found),
            scale.real(found.utility),
            max(bound, found.utility),
            dict(zip(prices.metrics, used.tolist())),
            scale.negligible,
            time.perf_counter() - begin,
        )

    def _found(self, prices: Prices) -> tuple[int, Assignment, int]:
        """(token option, assignment in its branch, bound on the utility of any)."""
        smallest = self._smallest[:, None] @ prices.weights.swapaxes(1, 2)
        costs = prices.outside + smallest[:, 0]
        tokens = self._tables.problem.tokens
        options = within_limits(prices.metrics, prices.limits, costs, tokens)
        metrics = [self._metrics.index(metric) for metric in prices.metrics]
        room = prices.limits - prices.outside
        rungs = self._rungs_of(prices.metrics)
        starts, multipliers = rungs.at(prices.weights, room)
        on_prompt = self._bounds.on(metrics, prices.weights, room)
        bounds = on_prompt.at(np.arange(len(starts)), multipliers)
        options.sort(key=lambda option: -bounds[option])
        is_simple = len(metrics) == 1 and self._alone is None
        enough = _ENOUGH if is_simple else _ENOUGH_OF_SEVERAL
        best: tuple[int, Assignment] | None = None
        for option in options[:_TRIED]:
            if best is not None and _is_near(best[1], bounds[option], enough):
                break
            branch = self._branches[option].weighed(prices.weights[option], room[option])
            found = fill(branch, rungs.start(branch, option, starts[option]), multipliers[option])
            if not _is_near(found, bounds[option], enough):
                tightest = on_prompt.tightest(option, multipliers[option])
                bounds[option], multipliers[option] = tightest
            if not _is_near(found, bounds[option], enough):
                weights = prices.weights[option]
                row = rungs.worthiest(option, weights, room[option], multipliers[option])
                other = rungs.start(branch, option, row)
                found = self._improved(branch, found, other, multipliers[option])
            if best is None or found.utility > best[1].utility:
                best = option, found
        assert best is not None
        return *best, int(bounds[options].max())

    def _improved(
        self,
        branch: Branch,
        found: Assignment,
        other: Assignment,
        prices: Floats,
    ) -> Assignment:
        """The better of what two answers become."""
        entry = (branch.value - np.tensordot(prices, branch.cost, 1)).argmax(axis=1)
        begun = (found, other, fill(branch, other, prices))
        return max(
            (improve(branch, each, prices, entry) for each in begun), key=lambda a: a.utility
        )

    def _rungs_of(self, metrics: tuple[str, ...]) -> Rungs:
        """The rungs for limits on some metrics."""
        if metrics not in self._limited:
            known = [self._metrics.index(metric) for metric in metrics]
            self._limited[metrics] = self._rungs.of_metrics(known)
        return self._limited[metrics]


def _is_near(found: Assignment, bound: int, enough: float) -> bool:
    return bool(bound - found.utility <= enough * abs(found.utility))

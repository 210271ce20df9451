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
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from planner.ir.errors import InputError
from planner.solver.branch import Assignment, Branch, Tables
from planner.solver.hull import Hull
from planner.solver.problem import Costs, Flags, Floats, Ints, Problem
from planner.solver.relaxation import relax
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
        self._bounds = _Bounds.of(self._branches)
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
        multipliers = np.zeros(prices.outside.shape)
        taken = {option: self._fitting(option, prices, multipliers) for option in options}
        bounds = self._bounds.at(prices, multipliers)
        options.sort(key=lambda option: -bounds[option])
        best: tuple[int, Assignment] | None = None
        for option in options[:_TRIED]:
            if best is not None and best[1].utility >= bounds[option]:
                break
            room = prices.limits - prices.outside[option]
            branch = _weighed(self._branches[option], prices.weights[option], room)
            start = branch.cheapest()
            if taken[option] >= 0:
                start = branch.assign(*self._hulls[option].first(taken[option]))
            found = improve(branch, start, relax(branch, multipliers[option]))
            if best is None or found.utility > best[1].utility:
                best = option, found
        assert best is not None
        bound = max(int(bounds[options[0]]), best[1].utility)
        used = prices.outside[best[0]] + best[1].cost
        cost = dict(zip(prices.metrics, used.tolist()))
        negligible = self._tables.scale.negligible
        return certified(self._tables, *best, bound, cost, negligible, time.perf_counter() - begin)

    def _fitting(self, option: int, prices: Prices, multipliers: Floats) -> int:
        """How much of a token option's frontier fits; also writes its multipliers.

        None of it (-1) fits where what is free on a typical prompt is too much on this one.
        """
        hull, room = self._hulls[option], prices.limits - prices.outside[option]
        cost = prices.weights[option] @ hull.cost[1:]
        taken = int((cost <= room[:, None]).all(axis=0).cumprod().sum()) - 1
        if 0 <= taken < len(hull.utility) - 1:
            before, after = cost[:, taken], cost[:, taken + 1]
            tight = int(np.argmax((after - room) / np.maximum(room, 1)))
            gain = float(hull.utility[taken + 1] - hull.utility[taken])
            multipliers[option, tight] = gain / max(float((after - before)[tight]), 1.0)
        return taken


@dataclass(frozen=True, eq=False)
class _Bounds:
    """Upper bounds of all token options at once, as `relax` has them of one.

    Attributes:
        utility: shape (options,).
        layer_utility: shape (options, layers).
        value: shape (sites, most switches + 1), of every count; -inf where it may not be kept.
        layer_cost: terms, shape (options, terms, layers).
        cost: terms, shape (options, terms, sites x counts).
        largest_cost: terms, shape (options, terms).
        optional: shape (layers,).
        inside: 1 where a site is of a layer, shape (sites, layers).
        largest_utility: of anything.
    """

    utility: Floats
    layer_utility: Floats
    value: Floats
    layer_cost: Floats
    cost: Floats
    largest_cost: Floats
    optional: Flags
    inside: Floats
    largest_utility: float

    @staticmethod
    def of(branches: Sequence[Branch]) -> _Bounds:
        """Of a frontier's branches, whose metrics are terms."""
        first, options = branches[0], len(branches)
        terms = len(first.room)
        layer_cost = np.array([branch.layer_cost for branch in branches], np.float64)
        cost = np.array([branch.cost for branch in branches], np.float64)
        return _Bounds(
            utility=np.array([branch.utility for branch in branches], np.float64),
            layer_utility=np.array([branch.layer_utility for branch in branches], np.float64),
            value=first.value,
            layer_cost=layer_cost,
            cost=cost.reshape(options, terms, -1),
            largest_cost=layer_cost.sum(axis=2) + cost.max(axis=3).sum(axis=2),
            optional=first.optional,
            inside=np.eye(first.layers)[first.site_layer],
            largest_utility=float(max(branch.largest_utility for branch in branches)),
        )

    def at(self, prices: Prices, multipliers: Floats) -> Ints:
        """Bounds on a prompt; shape (options,).

        Args:
            prices: of the prompt.
            multipliers: shape (options, metrics).
        """
        each = multipliers[:, None] @ prices.weights.astype(np.float64)
        value = self.value - (each @ self.cost).reshape(len(each), *self.value.shape)
        worth = self.layer_utility - (each @ self.layer_cost)[:, 0]
        worth += value.max(axis=2) @ self.inside
        room = prices.limits - prices.outside
        bound = self.utility + (multipliers * room).sum(axis=1)
        bound += np.where(self.optional, np.maximum(worth, 0.0), worth).sum(axis=1)
        # Twice the a-priori error of these sums, as in `relax`.
        magnitude = self.largest_utility + (multipliers * np.abs(room)).sum(axis=1)
        magnitude += (each[:, 0] * self.largest_cost).sum(axis=1)
        summed = each.shape[2] + room.shape[1] + sum(self.inside.shape) + 16
        margin = 2.0 * summed * float(np.finfo(np.float64).eps) * magnitude
        return np.asarray(np.floor(bound + margin), dtype=np.int64)


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

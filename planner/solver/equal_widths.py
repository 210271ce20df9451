"""The best choice among those that keep the same counts in every layer.

A checkpoint with plain configuration fields has one number of heads and one MLP width for all of
its layers. Which switches are kept may still differ from layer to layer, and layers may be off.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import partial
from itertools import product

import numpy as np
import numpy.typing as npt

from planner.ir.errors import InputError
from planner.solver.branch import FORBIDDEN, Branch, Tables
from planner.solver.problem import Ints, Problem
from planner.solver.search import Candidate, Search
from planner.solver.solution import (
    Infeasible,
    Solution,
    certify,
    deadline_after,
    feasible_options,
    listed,
)

Rows = npt.NDArray[np.intp]

_MOST_SETS = 20_000

# Utility of a layer that cannot run at the counts of its branch: below all others together.
_IMPOSSIBLE = -(1 << 54)


def solve_uniform(
    problem: Problem,
    *,
    counts: Mapping[str, Collection[int]] | None = None,
    time_limit_seconds: float = 20.0,
) -> Solution:
    """Maximise utility within all limits, with equal counts in all layers that are on.

    The n-th sites of all layers keep the same number of switches. Every token option with every
    such set of counts is a branch of its own, in which only layers are left to decide; the exact
    search goes through them by bound. The solution's bound is that of such choices.

    Layers must have equally many sites with equally many switches, if any. `counts`: kind of site
    (what a name starts with: ``heads``) -> counts to choose from; by default any. The time limit
    and errors are as for `solve`; InputError, too, where layers differ in shape.
    """
    begin = time.perf_counter()
    deadline = deadline_after(begin, time_limit_seconds)
    problem.check()
    if not problem.is_additive:
        raise InputError("the problem counts pairs, which plans of equal widths do not")
    options = feasible_options(problem)
    choices = _choices(problem, counts or {})
    sets_of_counts = math.prod(map(len, choices))
    if sets_of_counts > _MOST_SETS:
        raise InputError(
            f"there are {sets_of_counts} sets of equal counts, more than the {_MOST_SETS} that are "
            "gone through: divide MLPs into fewer groups"
        )
    tables = Tables(problem)
    branches = {option: tables.branch(option) for option in options}
    # Row s, column c: how many switches site s keeps under the c-th set of counts.
    sets = np.array(list(product(*choices)), dtype=np.int64)
    kept = np.tile(sets.T, (len(problem.sites) // max(len(choices), 1), 1))

    candidates, keys, runs = [], [], False
    smallest = np.full(len(problem.metrics), np.iinfo(np.int64).max)
    for option, branch in branches.items():
        bounds, costs = _screen(branch, kept)
        possible = bounds > _IMPOSSIBLE // 2
        if not possible.any():
            continue
        runs = True
        fits = possible & (costs <= branch.room[:, None]).all(axis=0)
        outside = problem.tokens[option].costs
        smallest = np.minimum(smallest, outside + costs[:, possible].min(axis=1))
        for column in np.flatnonzero(fits).tolist():
            build = partial(_tied, branch, kept[:, column])
            candidates.append(Candidate(int(bounds[column]), build))
            keys.append((option, column))
    if not runs:
        raise Infeasible("at none of the equal counts asked for can every layer run")
    if not candidates:
        needs = listed(problem.metrics, smallest)
        raise Infeasible(
            f"no choice with equal counts in all layers fits: it needs at least {needs}"
        )
    outcome = Search(candidates, deadline).run()
    option, column = keys[outcome.index]
    assignment = branches[option].assign(outcome.assignment.on, kept[:, column])
    seconds = time.perf_counter() - begin
    return certify(tables, option, assignment, outcome.bound, seconds)


def _choices(problem: Problem, counts: Mapping[str, Collection[int]]) -> list[list[int]]:
    """Counts to choose from, for each site of a layer that has any; all must be alike."""
    layers = [layer.sites for layer in problem.layers if layer.sites]
    shapes = {tuple(site.switches for site in sites) for sites in layers}
    if len(shapes) > 1:
        sizes = " and ".join(str(list(shape)) for shape in sorted(shapes))
        raise InputError(f"equal counts need layers of equal shape, not sites of {sizes} switches")
    choices = []
    for site in layers[0] if layers else ():
        every = range(site.switches + 1)
        allowed = counts.get(site.name.partition(".")[0], every)
        choices.append([count for count in every if count in allowed])
    return choices


def _layer_utility(branch: Branch, kept: Ints) -> Ints:
    """Utility of each layer, shape (layers, sets), with counts of shape (sites, sets)."""
    gain = np.take_along_axis(branch.gain, kept, axis=1)
    total = np.repeat(branch.layer_utility[:, None], kept.shape[1], axis=1)
    np.add.at(total, branch.site_layer, np.where(gain == FORBIDDEN, _IMPOSSIBLE, gain))
    return np.maximum(total, _IMPOSSIBLE)


def _screen(branch: Branch, kept: Ints) -> tuple[Ints, Ints]:
    """Utility without limits, shape (sets,), and cost of the layers that must run, (metrics, sets).

    `kept`: counts, shape (sites, sets).
    """
    worth = _layer_utility(branch, kept)
    taken = np.where(branch.optional[:, None], np.maximum(worth, 0), worth)
    bounds = branch.utility + np.maximum(taken.sum(axis=0), _IMPOSSIBLE)
    must = ~branch.optional
    cost = np.take_along_axis(branch.cost, kept[None], axis=2)[:, must[branch.site_layer]]
    return bounds, branch.layer_cost[:, must].sum(axis=1)[:, None] + cost.sum(axis=1)


def _tied(branch: Branch, counts: Ints) -> Branch:
    """The branch with the counts of its sites given, so that only layers are left to decide."""
    _, cost = branch.layer_totals(counts)
    return replace(
        branch,
        layer_utility=_layer_utility(branch, counts[:, None])[:, 0],
        layer_cost=cost,
        site_layer=np.zeros(0, dtype=np.intp),
        gain=np.zeros((0, 1), dtype=np.int64),
        cost=np.zeros((len(cost), 0, 1), dtype=np.int64),
    )

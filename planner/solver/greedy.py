"""Feasible by construction: take switches by score while they fit what is left of the limits.

Whatever a scheduler's logits say, the choice made from them respects every limit.
"""

from __future__ import annotations

import numpy as np

from planner.ir.errors import InputError
from planner.solver.problem import Choice, LayerChoices, Problem, top
from planner.solver.solution import feasible_options


def take_while_fits(problem: Problem) -> Choice:
    """Take the best token option, then every switch, best first, that still fits.

    Utilities are scores here: only their order matters. The token option is the best of those with
    a feasible choice. From its cheapest choice, switches are taken in order; one that does not fit
    is passed over. A switch counts no more than the layer it is in, which must run first. Ties go
    to the earlier in model order. No switch of a running layer, and no layer, is left that would
    still fit. InputError where a utility is not finite, Infeasible where no choice respects the
    limits.
    """
    options = feasible_options(problem)
    option = max(options, key=lambda index: (problem.tokens[index].utility, -index))
    left = (problem.limits - problem.smallest_costs()[option]).tolist()
    on = [not layer.optional for layer in problem.layers]
    counts = [[site.minimum for site in layer.sites] for layer in problem.layers]
    steps = [
        [np.diff(site.costs[option]).T.tolist() for site in layer.sites] for layer in problem.layers
    ]
    for layer, site in _turns(problem):
        if site is None:
            cost = _entry_cost(problem.layers[layer], option)
        elif on[layer]:
            cost = steps[layer][site][counts[layer][site]]
        else:
            continue
        if any(price > rest for price, rest in zip(cost, left)):
            continue
        left = [rest - price for price, rest in zip(cost, left)]
        if site is None:
            on[layer] = True
        else:
            counts[layer][site] += 1
    kept = {
        site.name: top(site.utilities, count) if running else ()
        for layer, running, numbers in zip(problem.layers, on, counts)
        for site, count in zip(layer.sites, numbers)
    }
    return Choice(option, tuple(on), kept)


def _turns(problem: Problem) -> list[tuple[int, int | None]]:
    """(layer, site in the layer, or None for the layer itself), once per switch, best first."""
    turns: list[tuple[float, int, int | None]] = []
    for index, layer in enumerate(problem.layers):
        most = layer.utility if layer.optional else np.inf
        if layer.optional:
            turns.append((most, index, None))
        for position, site in enumerate(layer.sites):
            ranked = -np.sort(-site.utilities)[site.minimum :]
            turns += [(score, index, position) for score in np.minimum(ranked, most).tolist()]
    if not np.isfinite([score for score, *_ in turns]).all():
        raise InputError("the utility of a switch is not a finite number")
    # The sort is stable: of equal scores in a layer, its own comes first.
    turns.sort(key=lambda turn: -turn[0])
    return [(layer, site) for _, layer, site in turns]


def _entry_cost(layer: LayerChoices, option: int) -> list[int]:
    """Cost of a layer with every site at its minimum, per metric."""
    cost = layer.costs[option].copy()
    for site in layer.sites:
        cost += site.costs[option, :, site.minimum]
    entry: list[int] = cost.tolist()
    return entry

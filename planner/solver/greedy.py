"""Feasible by construction: take switches by score while they fit what is left of the limits.

Whatever a scheduler's logits say, the choice made from them respects every limit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.ir.errors import InputError
from planner.solver.problem import Choice, LayerChoices, Problem, top
from planner.solver.solution import feasible_options

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """How much each switch is wanted; only the order matters."""

    tokens: Floats  # (token options,)
    layers: Floats  # (layers,)
    sites: Mapping[str, Floats]  # site name -> (switches,)

    @staticmethod
    def of_utilities(problem: Problem) -> Scores:
        """A problem's own utilities as scores."""
        return Scores(
            np.array([token.utility for token in problem.tokens], dtype=np.float64),
            np.array([layer.utility for layer in problem.layers], dtype=np.float64),
            {site.name: site.utilities for site in problem.sites},
        )


def take_while_fits(problem: Problem, scores: Scores) -> Choice:
    """Take the best-scored token option, then every switch, best first, that still fits.

    The token option is the best-scored of those with a feasible choice. From its cheapest choice,
    switches are taken in order of score; one that does not fit is passed over. A switch counts no
    more than the layer it is in, which must run first. Ties go to the earlier in model order. No
    switch of a running layer, and no layer, is left that would still fit.

    The problem's own utilities are not used. InputError where scores are not finite or not in the
    problem's shapes, Infeasible where no choice respects the limits.
    """
    _check(problem, scores)
    options = feasible_options(problem)
    option = max(options, key=lambda index: (scores.tokens[index], -index))
    left = (problem.limits - problem.smallest_costs()[option]).tolist()
    on = [not layer.optional for layer in problem.layers]
    counts = [[site.minimum for site in layer.sites] for layer in problem.layers]
    steps = [
        [np.diff(site.costs[option]).T.tolist() for site in layer.sites] for layer in problem.layers
    ]
    for layer, site in _turns(problem, scores):
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
        site.name: top(scores.sites[site.name], count) if running else ()
        for layer, running, numbers in zip(problem.layers, on, counts)
        for site, count in zip(layer.sites, numbers)
    }
    return Choice(option, tuple(on), kept)


def _turns(problem: Problem, scores: Scores) -> list[tuple[int, int | None]]:
    """(layer, site in the layer, or None for the layer itself), once per switch, best first."""
    turns: list[tuple[float, int, int | None]] = []
    for index, layer in enumerate(problem.layers):
        most = float(scores.layers[index]) if layer.optional else np.inf
        if layer.optional:
            turns.append((most, index, None))
        for position, site in enumerate(layer.sites):
            ranked = -np.sort(-scores.sites[site.name])[site.minimum :]
            turns += [(score, index, position) for score in np.minimum(ranked, most).tolist()]
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


def _check(problem: Problem, scores: Scores) -> None:
    shapes = [
        ("token options", scores.tokens, len(problem.tokens)),
        ("layers", scores.layers, len(problem.layers)),
        *(
            (f"site {site.name}", scores.sites.get(site.name), site.switches)
            for site in problem.sites
        ),
    ]
    for what, given, count in shapes:
        if given is None:
            raise InputError(f"there are no scores for {what}")
        if given.shape != (count,):
            raise InputError(f"the scores of {what} have shape {given.shape}, not {(count,)}")
        if not np.isfinite(given).all():
            raise InputError(f"a score of {what} is not a finite number")

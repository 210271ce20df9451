"""Lagrangian relaxation of one branch: upper bounds, and what every single decision would lose.

With a price per unit of each metric instead of limits, sites and layers decide on their own:

    bound(prices) = utility + prices . room + sum over layers of max(0, worth of the layer),
    worth of a layer = utility - prices . cost
                       + sum over sites of max over n of (gain(n) - prices . cost(n)).

Any prices >= 0 give a valid bound (Everett 1963, doi:10.1287/opre.11.3.399); the tightest equals
the bound of the linear program over convex combinations, whose dual values they are. Forcing one
decision that the relaxation does not take lowers the bound by its loss, so decisions whose loss
exceeds the distance to a known answer are settled (reduced-cost fixing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from planner.solver.branch import Assignment, Branch
from planner.solver.linear_program import dual_values
from planner.solver.problem import Floats

_BISECTIONS = 8


@dataclass(frozen=True, eq=False)
class Relaxation:
    """What a branch is worth at given prices."""

    prices: Floats  # (metrics,), integer utility units per unit of cost, not negative
    bound: int  # no feasible assignment of the branch has a larger utility; rounding included
    margin: float  # largest rounding error of `bound`, and of any comparison of a loss with it
    worth: Floats  # (layers,): of each layer at its best counts; it is taken if positive
    loss: Floats  # (sites, most switches + 1): how far each count is below the site's best
    assignment: Assignment  # what the relaxation takes; it need not fit the room


def relax(branch: Branch, prices: Floats) -> Relaxation:
    """Solve a branch at given prices."""
    value = branch.value - np.tensordot(prices, branch.cost, 1)
    counts = value.argmax(axis=1)
    best = value[branch.site_index, counts]
    worth = branch.layer_utility - prices @ branch.layer_cost
    worth = worth + np.bincount(branch.site_layer, best, branch.layers)
    on = (worth > 0) | ~branch.optional
    bound = branch.utility + float(prices @ branch.room) + float(worth[on].sum())
    margin = _rounding_error(branch, prices)
    return Relaxation(
        prices=prices,
        bound=int(np.floor(bound + margin)),
        margin=margin,
        worth=worth,
        loss=best[:, None] - value,
        assignment=branch.assign(on, counts),
    )


def best_prices(branch: Branch, seconds: float = math.inf) -> Floats:
    """The prices with the tightest bound, up to the tolerance of the linear program.

    The branch's cheapest assignment must fit. Where the linear program takes more `seconds`, prices
    in proportion to the room, found by bisection, take its place.
    """
    free = np.zeros(len(branch.room))
    if branch.fits(relax(branch, free).assignment.cost):
        return free
    found = dual_values(branch, seconds) if seconds > 0 else None
    return _proportional_prices(branch) if found is None else np.maximum(found[0], 0.0)


def _proportional_prices(branch: Branch) -> Floats:
    """Prices that make all limits equally dear, as low as what is taken then fits."""
    unit = 1.0 / np.maximum(branch.room, 1)
    low, high = 0.0, float(branch.largest_utility) + 1.0
    for _ in range(_BISECTIONS):
        # Of utilities a million times apart the right ones are found as soon as of equal ones.
        middle = math.sqrt(max(low, 1.0) * high)
        if branch.fits(relax(branch, unit * middle).assignment.cost):
            high = middle
        else:
            low = middle
    return unit * high


def _rounding_error(branch: Branch, prices: Floats) -> float:
    """Twice the a-priori error of the sums in `relax` (Higham 2002, section 4.2)."""
    magnitude = branch.largest_utility + float(prices @ branch.largest_cost)
    terms = len(prices) + branch.sites + branch.layers + 16
    return 2.0 * terms * float(np.finfo(np.float64).eps) * magnitude

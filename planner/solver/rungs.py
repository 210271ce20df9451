"""Rungs: the best choices of every token option at falling prices, weighed for a typical prompt.

At given prices sites and layers decide on their own (`relaxation`), and where layers are lost in
pairs, which are on is found by local search. Prices are of one metric or of a mixture of several,
so that whatever is limited, and however tightly, some rungs use it well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import numpy.typing as npt

from planner.solver.branch import FORBIDDEN, Assignment, Branch
from planner.solver.pairs import members, together
from planner.solver.problem import Costs, Flags, Floats, Ints

# Rungs of one mixture of metrics, and the parts that it is mixed of.
_RUNGS, _PARTS = 128, (0, 1, 2, 4, 8)


@dataclass(frozen=True, eq=False)
class Rungs:
    """Rungs of all token options, by mixture of metrics and then from the highest price to 0."""

    shares: Floats  # (rungs, metrics): of the price, by metric; they add up to 1
    on: Flags  # (options, rungs, layers)
    counts: Ints  # (options, rungs, sites): switches kept; in a layer that is off, were it on
    utility: Floats  # (options, rungs), whole numbers: pairs included
    terms: Floats  # (options, terms, rungs): cost
    paid: Floats  # (options, metrics, rungs): what its typical cost is worth at its prices
    priced: Flags  # (options, rungs): whether `paid` says what they are

    @staticmethod
    def of(branches: Sequence[Branch], weights: Costs) -> Rungs:
        """Of branches whose metrics are terms.

        `weights`: of the terms on a typical prompt, shape (options, metrics, terms).
        """
        mixed = np.array(list(product(_PARTS, repeat=weights.shape[1]))[1:])
        mixtures = np.unique(mixed / mixed.sum(axis=1, keepdims=True), axis=0)
        found = [
            [_of_branch(branch, typical.astype(np.float64), shares) for shares in mixtures]
            for branch, typical in zip(branches, weights, strict=True)
        ]
        fields = (
            np.array([np.concatenate([rungs[part] for rungs in row], axis=axis) for row in found])
            for part, axis in enumerate((0, 0, 0, 1, 1, 0))
        )
        return Rungs(np.repeat(mixtures, _RUNGS, axis=0), *fields)

    def of_metrics(self, metrics: Sequence[int]) -> Rungs:
        """Those whose prices are of no other metrics than these."""
        of = np.flatnonzero(~np.delete(self.shares, metrics, axis=1).any(axis=1))
        return Rungs(
            self.shares[of][:, metrics],
            self.on[:, of],
            self.counts[:, of],
            self.utility[:, of],
            self.terms[:, :, of],
            self.paid[:, metrics][:, :, of],
            self.priced[:, of],
        )

    def at(self, weights: Costs, room: Costs) -> tuple[Ints, Floats]:
        """The best rung that fits, (options,), and prices that bound an option well, (options,
        metrics).

        Args:
            weights: of the terms, on a prompt; shape (options, metrics, terms).
            room: that is left for them, (options, metrics).
        """
        cost, room = weights.astype(np.float64) @ self.terms, room[:, :, None]
        best = np.where((cost <= room).all(axis=1), self.utility, -np.inf).argmax(axis=1)
        # Of what a rung costs, the same is paid as on the typical prompt.
        prices = self.paid / np.maximum(cost, 1.0)
        bound = self.utility + (prices * (room - cost)).sum(axis=1)
        lowest = np.where(self.priced, bound, np.inf).argmin(axis=1)
        return best, prices[np.arange(len(cost)), :, lowest]

    def start(self, branch: Branch, option: int, row: int) -> Assignment:
        """A rung as an assignment of a branch that fits: the cheapest, where it does not."""
        found = branch.assign(self.on[option, row], self.counts[option, row])
        return found if branch.fits(found.cost) else branch.cheapest()

    def worthiest(self, option: int, weights: Costs, room: Costs, prices: Floats) -> int:
        """The rung of an option that is worth most with what it leaves of the room, at some prices.

        The others: as for `at`, of this option.
        """
        cost = weights @ self.terms[option]
        worth = self.utility[option] + prices @ (room[:, None] - cost)
        return int(np.where((cost <= room[:, None]).all(axis=0), worth, -np.inf).argmax())


def _of_branch(branch: Branch, weights: Floats, shares: Floats) -> tuple[npt.NDArray[Any], ...]:
    """Rungs of one branch and one mixture: the fields of `Rungs` but the first, in their order."""
    cost = np.tensordot(weights, branch.cost.astype(np.float64), 1)
    layer_cost = weights @ branch.layer_cost
    most = cost.max(axis=2, initial=0.0).sum(axis=1) + layer_cost.sum(axis=1)
    unit = shares / np.maximum(most, 1.0)
    cost, layer_cost = np.tensordot(unit, cost, 1), unit @ layer_cost
    price = _prices(branch, cost, layer_cost)
    value = branch.value - price[:, None, None] * cost
    counts = value.argmax(axis=2)
    worth = branch.layer_utility - price[:, None] * layer_cost
    worth += value.max(axis=2) @ (branch.site_layer[:, None] == np.arange(branch.layers))
    on = _layers_on(branch, worth)
    # The cheapest of all comes first: it fits wherever anything does.
    on[0], counts[0] = ~branch.optional, branch.minimum
    utility, terms = _totals(branch, on, counts)
    paid = price * unit[:, None] * (weights @ terms)
    # What costs nothing says nothing of its price.
    priced = (paid[shares > 0] > 0).all(axis=0) | (price == 0)
    priced[0] = False
    return on, counts, utility, terms, paid, priced


def _prices(branch: Branch, cost: Floats, layer_cost: Floats) -> Floats:
    """Prices at which decisions change, as many as there are rungs, from the highest to 0."""
    slopes = []
    # Where costs rise in stairs, what matters is what several switches together are worth.
    for more in (1, 2, 3):
        gain = branch.gain[:, more:] - branch.gain[:, :-more]
        paid = cost[:, more:] - cost[:, :-more]
        useful = (branch.gain[:, :-more] > FORBIDDEN) & (gain > 0) & (paid > 0)
        slopes.append(gain[useful] / paid[useful])
    best = branch.value.max(axis=1)
    whole = branch.layer_utility + np.bincount(branch.site_layer, best, branch.layers)
    whole_cost = layer_cost + np.bincount(branch.site_layer, cost[:, -1], branch.layers)
    entered = branch.optional & (whole > 0) & (whole_cost > 0)
    known = np.concatenate([*slopes, whole[entered] / whole_cost[entered]])
    if not len(known):
        return np.zeros(_RUNGS)
    spread = np.quantile(known, np.linspace(1.0, 0.0, _RUNGS - 1))
    return np.append(spread, 0.0)


def _layers_on(branch: Branch, worth: Floats) -> Flags:
    """The layers to have on, of so much worth each besides pairs; both of shape (rungs, layers).

    With pairs no change of one or two layers helps.
    """
    off = (worth <= 0) & branch.optional
    if branch.pairs is None:
        return np.asarray(~off)
    inside = members(branch)
    losses = inside @ together(branch) @ inside.T
    # A layer takes its own sites along.
    worth = worth + np.diag(losses) / 2
    np.fill_diagonal(losses, 0.0)
    index = np.arange(branch.layers)
    for _ in range(2 * branch.layers):
        sign = 1.0 - 2.0 * off
        change = np.where(branch.optional, sign * (worth + off @ losses), np.inf)
        both = change[:, :, None] + change[:, None, :] + sign[:, :, None] * sign[:, None] * losses
        both[:, index, index] = change
        flat = both.reshape(len(off), -1)
        least = flat.argmin(axis=1)
        rows = np.flatnonzero(flat[np.arange(len(off)), least] < 0)
        if not len(rows):
            break
        first, second = np.divmod(least[rows], branch.layers)
        off[rows, first] ^= True
        off[rows[first != second], second[first != second]] ^= True
    return np.asarray(~off)


def _totals(branch: Branch, on: Flags, counts: Ints) -> tuple[Floats, Floats]:
    """Utility, shape (rungs,), and terms, (terms, rungs), as `Branch.assign` has them of one."""
    running = on[:, branch.site_layer]
    gain = np.where(running, branch.gain[branch.site_index, counts], 0)
    utility = branch.utility + (on * branch.layer_utility).sum(axis=1) + gain.sum(axis=1)
    if branch.pairs is not None:
        off = ~np.concatenate([on, running & (counts > 0)], axis=1)
        utility = utility - ((off @ together(branch)) * off).sum(axis=1) / 2
    cost = np.where(running, branch.cost[:, branch.site_index, counts], 0).sum(axis=2)
    terms = branch.layer_cost @ on.T + cost
    return utility.astype(np.float64), terms.astype(np.float64)

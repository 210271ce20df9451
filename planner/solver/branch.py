"""One token option of a Problem as integer tables, the form in which everything here computes.

Utilities become integers, exactly summable in int64 and in float64 alike: each is multiplied by one
power of two so that all of them together stay below 2^52, and rounded. `Scale.slack` bounds what
the rounding can hide from any choice; certificates add it. Switches of a site are sorted by
utility, so a site is a chain: keeping n switches means the best n, and is worth a prefix sum.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from planner.solver.pairs import Pairs
from planner.solver.problem import Choice, Costs, Flags, Floats, Ints, Problem, ranked
from planner.solver.reach import within_reach

#: Utility of a number of switches that may not be kept; no sum of utilities comes near it.
FORBIDDEN = -(1 << 60)

# float64 holds every integer up to 2^53.
_UTILITY_BITS = 52


@dataclass(frozen=True)
class Scale:
    """The power of two that turns utilities into integers: round(utility * 2^exponent).

    `slack` is the largest difference, in integer units, between the rounded and the exact utility
    of any choice; 0 where every utility is a whole number of units.
    """

    exponent: int
    slack: int

    @staticmethod
    def of(problem: Problem) -> Scale:
        """The finest scale at which all utilities together stay below 2^52.

        `problem`: as `within_reach` leaves it.
        """
        layers = np.array([layer.utility for layer in problem.layers], dtype=np.float64)
        pairs = np.array([pair.loss for pair in problem.pairs], dtype=np.float64)
        losses = [t.layer_losses for t in problem.tokens if t.layer_losses is not None]
        sites = [site.utilities for site in problem.sites]
        summed = np.concatenate([layers, pairs, *losses, *sites])
        tokens = np.array([token.utility for token in problem.tokens], dtype=np.float64)
        most = math.fsum(np.abs(summed).tolist()) + float(np.abs(tokens).max())
        # Where all is worth nothing, nothing is negligible.
        exponent = _UTILITY_BITS - math.frexp(most or sys.float_info.min)[1]
        error = math.fsum(_rounding(summed, exponent).tolist())
        return Scale(exponent, math.ceil(error + float(_rounding(tokens, exponent).max())))

    def integers(self, utilities: npt.ArrayLike) -> Ints:
        """Utilities as integers."""
        return np.rint(np.ldexp(np.asarray(utilities, np.float64), self.exponent)).astype(np.int64)

    @property
    def negligible(self) -> float:
        """About a thousandth of all utilities together; gaps are relative to no less."""
        return max(self.real(1 << (_UTILITY_BITS - 10)), sys.float_info.min)

    def real(self, units: int) -> float:
        """Integer units as a utility."""
        return math.ldexp(units, -self.exponent)


@dataclass(frozen=True, eq=False)
class Assignment:
    """A choice in one branch, by counts."""

    on: Flags  # (layers,)
    counts: Ints  # (sites,): switches kept; 0 in layers that are off
    utility: int  # in integer units
    cost: Costs  # (metrics,): what it takes of the branch's `room`


@dataclass(frozen=True, eq=False)
class Branch:
    """One token option: layers with their chains, and the room that is left for them."""

    utility: int  # of the token option, in integer units
    room: Costs  # (metrics,): limits less the token option's cost; negative if it does not fit
    optional: Flags  # (layers,): whether a layer may be off
    layer_utility: Ints  # (layers,)
    layer_cost: Costs  # (metrics, layers)
    site_layer: npt.NDArray[np.intp]  # (sites,): the layer of each site
    gain: Ints  # (sites, most switches + 1): utility of the best n switches, or `FORBIDDEN`
    cost: Costs  # (metrics, sites, most switches + 1); past a site's last switch it stays
    pairs: Pairs | None = None  # what is lost when two units are off

    @property
    def layers(self) -> int:
        """Number of layers."""
        return len(self.optional)

    @property
    def sites(self) -> int:
        """Number of sites."""
        return len(self.site_layer)

    @cached_property
    def site_index(self) -> npt.NDArray[np.intp]:
        """0, 1, ..., sites - 1: the row of each site when counts pick from `gain` and `cost`."""
        return np.arange(self.sites)

    @cached_property
    def minimum(self) -> Ints:
        """Fewest switches of each site that may be kept; shape (sites,)."""
        return np.asarray((self.gain > FORBIDDEN).argmax(axis=1), dtype=np.int64)

    @cached_property
    def value(self) -> Floats:
        """`gain` as real numbers, minus infinity where a number of switches may not be kept."""
        return np.where(self.gain > FORBIDDEN, self.gain, -np.inf)

    @cached_property
    def largest_utility(self) -> int:
        """Sum of the largest absolute utilities that anything in the branch can have."""
        allowed = np.where(self.gain > FORBIDDEN, self.gain, 0)
        total = abs(self.utility) + np.abs(self.layer_utility).sum()
        return int(total + np.abs(allowed).max(axis=1).sum())

    @cached_property
    def largest_cost(self) -> Costs:
        """Sum of the room and of the largest costs in the branch; shape (metrics,)."""
        total = np.abs(self.room) + self.layer_cost.sum(axis=1)
        return np.asarray(total + self.cost.max(axis=2).sum(axis=1))

    def weighed(self, weights: Costs, room: Costs) -> Branch:
        """Where metrics are terms: the branch with sums of these, weighed, (metrics, terms), as
        metrics."""
        return replace(
            self,
            room=room,
            layer_cost=weights @ self.layer_cost,
            cost=np.tensordot(weights, self.cost, 1),
        )

    def layer_totals(self, counts: Ints) -> tuple[Ints, Costs]:
        """Utility, shape (layers,), and cost, (metrics, layers), with sites at given counts."""
        utility, cost = self.layer_utility.copy(), self.layer_cost.T.copy()
        np.add.at(utility, self.site_layer, self.gain[self.site_index, counts])
        np.add.at(cost, self.site_layer, self.cost[:, self.site_index, counts].T)
        return utility, cost.T

    def assign(self, on: Flags, counts: Ints) -> Assignment:
        """Total utility and cost of layers and counts."""
        running = on[self.site_layer]
        utility = self.utility + int(self.layer_utility[on].sum())
        utility += int(self.gain[self.site_index, counts][running].sum())
        cost = self.layer_cost[:, on].sum(axis=1)
        cost = cost + self.cost[:, self.site_index, counts][:, running].sum(axis=1)
        counts = np.where(running, counts, 0)
        if self.pairs is not None:
            utility -= self.pairs.lost(on, counts > 0)
        return Assignment(on, counts, utility, cost)

    def cheapest(self) -> Assignment:
        """Every optional layer off, every site of the others at its minimum."""
        return self.assign(~self.optional, self.minimum)

    def fits(self, cost: Costs) -> bool:
        """Whether a cost is within the room in every metric."""
        return bool((cost <= self.room).all())


class Tables:
    """A Problem, scaled: makes its branches, and turns their assignments back into choices.

    Its `problem` may be given lower limits later; the `scale` is of all that could be chosen under
    the limits that the tables were made for.
    """

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        problem = within_reach(problem)
        self.scale = Scale.of(problem)
        layers = problem.layers
        self._token_utility = self.scale.integers([token.utility for token in problem.tokens])
        self._layer_utility = self.scale.integers([layer.utility for layer in layers])
        self._optional = np.array([layer.optional for layer in layers], dtype=bool)
        self._site_layer = np.array(
            [index for index, layer in enumerate(layers) for _ in layer.sites], dtype=np.intp
        )
        widest = max((site.switches for site in problem.sites), default=0)
        self._gain = np.full((len(self._site_layer), widest + 1), FORBIDDEN, dtype=np.int64)
        for row, site in zip(self._gain, problem.sites):
            units = -np.sort(-self.scale.integers(site.utilities))
            sums = np.concatenate([[0], np.cumsum(units)])
            row[site.minimum : site.switches + 1] = sums[site.minimum :]
        worth = self._layer_utility.copy()
        np.add.at(worth, self._site_layer, self._gain.max(axis=1))
        self._worth = worth
        self._layer_losses = self.scale.integers(
            [
                np.zeros(len(layers)) if token.layer_losses is None else token.layer_losses
                for token in problem.tokens
            ]
        )
        self._pairs = self._paired() if problem.pairs else None
        # Switches of every site, the most useful first; and, once asked for, the best few of them.
        self._ranked = [ranked(site.utilities) for site in self.problem.sites]
        self._best: dict[tuple[int, int], tuple[int, ...]] = {}
        self._names = [site.name for site in problem.sites]

    def _paired(self) -> Pairs:
        names = [layer.name for layer in self.problem.layers]
        units = {name: n for n, name in enumerate(names + [s.name for s in self.problem.sites])}
        pairs = self.problem.pairs
        return Pairs(
            np.array([units[pair.first] for pair in pairs]),
            np.array([units[pair.second] for pair in pairs]),
            self.scale.integers([pair.loss for pair in pairs]),
        )

    def optimistic(self, option: int) -> int:
        """Utility of the best assignment of a branch, were there no limits."""
        off = -self._layer_losses[option]
        best = np.where(self._optional, np.maximum(self._worth, off), self._worth)
        most = int(self._token_utility[option] + best.sum())
        return most if self._pairs is None else most + int(np.maximum(-self._pairs.loss, 0).sum())

    def branch(self, option: int) -> Branch:
        """The branch of one token option."""
        problem = self.problem
        metrics = len(problem.metrics)
        cost = np.zeros((metrics, *self._gain.shape), dtype=np.int64)
        for row, site in enumerate(problem.sites):
            cost[:, row, : site.switches + 1] = site.costs[option]
            cost[:, row, site.switches + 1 :] = site.costs[option, :, -1:]
        layer_cost = np.zeros((metrics, len(problem.layers)), dtype=np.int64)
        for column, layer in enumerate(problem.layers):
            layer_cost[:, column] = layer.costs[option]
        return Branch(
            utility=int(self._token_utility[option] - self._layer_losses[option].sum()),
            room=problem.limits - problem.tokens[option].costs,
            optional=self._optional,
            layer_utility=self._layer_utility + self._layer_losses[option],
            layer_cost=layer_cost,
            site_layer=self._site_layer,
            gain=self._gain,
            cost=cost,
            pairs=self._pairs,
        )

    def choice(self, option: int, assignment: Assignment) -> Choice:
        """The choice that keeps the best switches, as many as the assignment says."""
        kept = {}
        for site in enumerate(assignment.counts.tolist()):
            if site not in self._best:
                row, count = site
                self._best[site] = tuple(sorted(self._ranked[row][:count]))
            kept[self._names[site[0]]] = self._best[site]
        return Choice(option, tuple(assignment.on.tolist()), kept)

    def assignment(self, choice: Choice) -> Assignment:
        """The assignment that keeps as many switches as a choice does, in its option's branch."""
        counts = [len(choice.kept[site.name]) for site in self.problem.sites]
        return self.branch(choice.token_option).assign(
            np.array(choice.layers_on, dtype=bool), np.array(counts, dtype=np.int64)
        )


def _rounding(utilities: Floats, exponent: int) -> Floats:
    """By how much each utility differs from a whole number of units."""
    units = np.ldexp(utilities, exponent)
    return np.asarray(np.abs(units - np.rint(units)))

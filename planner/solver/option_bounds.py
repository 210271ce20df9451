"""Upper bounds of all token options at once, on any prompt: what `relaxation` has of one branch.

Pairs enter through their linear bounds (`pairs.additive_bound`). The multipliers of those are dual
values that are good for so much room: they are computed when a prompt leaves about so much, on the
typical prompt, and kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from planner.solver.branch import Branch
from planner.solver.pairs import additive_bound, together
from planner.solver.problem import Costs, Flags, Floats, Ints

# Multipliers that are tried for a tighter bound: so many, up to these times more or less.
_SCALES, _SPREADS = 17, (2.0, 1.1, 1.01)
# Room is told apart in so many parts of all that can be spent.
_ROOMS = 20
_MOST_BOUND = float(1 << 61)


class OptionBounds:
    """Of a frontier's branches, whose metrics are terms.

    `weights`: of the terms on a typical prompt, shape (options, metrics, terms).
    """

    def __init__(self, branches: Sequence[Branch], weights: Costs) -> None:
        self._branches, self._weights = branches, weights
        first = branches[0]
        self._layer_cost = np.array([branch.layer_cost for branch in branches], np.float64)
        # Of one option, where all cost the same.
        alike = all(np.array_equal(branch.cost, first.cost) for branch in branches)
        cost = np.array([branch.cost for branch in branches[: 1 if alike else None]], np.float64)
        self._cost = cost.reshape(*cost.shape[:2], -1)
        self._most = self._layer_cost.sum(axis=2) + cost.max(axis=3).sum(axis=2)
        lost = float(np.abs(together(first)).sum())
        self._largest = max(branch.largest_utility for branch in branches) + 3 * lost
        self._inside = (first.site_layer[:, None] == np.arange(first.layers)).astype(np.float64)
        # What options are worth without pairs; and with them, by option, metrics and room.
        self._worth = None if first.pairs is not None else _Worth.of(branches)
        self._above: dict[tuple[object, ...], Branch] = {}

    def on(self, metrics: Sequence[int], weights: Costs, room: Costs) -> BoundsOnPrompt:
        """Bounds on one prompt.

        Args:
            metrics: that are limited, by number.
            weights: of the terms, shape (options, metrics, terms).
            room: that is left for them, shape (options, metrics).
        """
        each = weights.astype(np.float64)
        worth = self._worth
        if worth is None:
            whole = (each @ self._most[:, :, None])[:, :, 0]
            shares = (room / np.maximum(whole, 1.0)).min(axis=1, initial=1.0)
            parts = np.maximum(np.rint(_ROOMS * shares), 1).astype(np.int64).tolist()
            worth = _Worth.of([self._additive(n, metrics, part) for n, part in enumerate(parts)])
        return BoundsOnPrompt(
            worth,
            each,
            room.astype(np.float64),
            self._layer_cost,
            self._cost,
            self._most,
            self._branches[0].optional,
            self._inside,
            self._largest,
        )

    def _additive(self, option: int, metrics: Sequence[int], part: int) -> Branch:
        """A branch without pairs that bounds an option where such a part of all can be spent."""
        key = (option, *metrics, part)
        if key not in self._above:
            weights = self._weights[option, metrics]
            room = weights @ self._most[option] * part / _ROOMS
            branch = self._branches[option].weighed(weights, room.astype(np.int64))
            self._above[key] = additive_bound(branch)
        return self._above[key]


@dataclass(frozen=True, eq=False)
class _Worth:
    """What options are worth, without pairs."""

    utility: Floats  # (options,)
    layer_utility: Floats  # (options, layers)
    value: Floats  # (options, sites, most switches + 1), of every count; of one where all are alike

    @staticmethod
    def of(branches: Sequence[Branch]) -> _Worth:
        alike = all(branch.gain is branches[0].gain for branch in branches)
        return _Worth(
            np.array([branch.utility for branch in branches], np.float64),
            np.array([branch.layer_utility for branch in branches], np.float64),
            np.array([branch.value for branch in branches[: 1 if alike else None]]),
        )


@dataclass(frozen=True, eq=False)
class BoundsOnPrompt:
    """The bounds of all options as functions of multipliers, one per limited metric."""

    worth: _Worth
    weights: Floats  # (options, metrics, terms)
    room: Floats  # (options, metrics)
    layer_cost: Floats  # (options, terms, layers)
    cost: Floats  # (options, terms, sites x counts); of one option where all are alike
    most: Floats  # (options, terms): of everything
    optional: Flags  # (layers,)
    inside: Floats  # (sites, layers): 1 where a site is of a layer
    largest: float  # sum of the largest utilities there can be

    def at(self, options: Ints, multipliers: Floats) -> Ints:
        """Bounds of options, given by number, shape (n,), at multipliers, shape (n, metrics)."""
        each = multipliers[:, None] @ self.weights[options]
        room, worth = self.room[options], self.worth
        value = _of(worth.value, options) - (each @ _of(self.cost, options)).reshape(
            len(each), *worth.value.shape[1:]
        )
        layers = worth.layer_utility[options] - (each @ self.layer_cost[options])[:, 0]
        layers += value.max(axis=2) @ self.inside
        bound = worth.utility[options] + (multipliers * room).sum(axis=1)
        bound += np.where(self.optional, np.maximum(layers, 0.0), layers).sum(axis=1)
        # Twice the a-priori error of these sums, as in `relax`.
        magnitude = self.largest + (multipliers * np.abs(room)).sum(axis=1)
        magnitude += (each[:, 0] * self.most[options]).sum(axis=1)
        summed = each.shape[2] + room.shape[1] + sum(self.inside.shape) + 16
        margin = 2.0 * summed * float(np.finfo(np.float64).eps) * magnitude
        # Options that are far beyond the limits have bounds that are none.
        within = np.clip(np.floor(bound + margin), -_MOST_BOUND, _MOST_BOUND)
        return np.asarray(within, dtype=np.int64)

    def tightest(self, option: int, multipliers: Floats) -> tuple[int, Floats]:
        """The lowest bound of an option at multipliers in proportion to some, (metrics,), and those
        at which it is."""
        options = np.full(_SCALES, option)
        for spread in _SPREADS:
            tried = multipliers * np.geomspace(1 / spread, spread, _SCALES)[:, None]
            bounds = self.at(options, tried)
            multipliers = tried[bounds.argmin()]
        return int(bounds.min()), multipliers


def _of(table: Floats, options: Ints) -> Floats:
    return table if len(table) == 1 else table[options]

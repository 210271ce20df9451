"""Pairs of a branch: losses that fall due when both of two things are off.

A unit is a layer, off or on, or a site, off when it keeps nothing (so in a layer that is off). The
solver's bounds are additive, so pairs enter them through their best linear bounds (the roof dual of
Hammer, Hansen and Simeone 1984, doi:10.1007/BF02612354). With a, b = 1 where a unit is off:

    a loss v > 0:   -v a b <= -m (a + b - 1)             for any 0 <= m <= v
    a gain w = -v:   w a b <= p a + (w - p) b            for any 0 <= p <= w

The multipliers are dual values of the linear program in which products are linearised. All are
whole numbers, so the bound holds exactly. The core gets the products themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from planner.solver.linear_program import dual_values
from planner.solver.problem import Flags, Floats, Ints

if TYPE_CHECKING:
    from planner.solver.branch import Branch


@dataclass(frozen=True, eq=False)
class Pairs:
    """Pairs of units, each of shape (pairs,); unit u is layer u, or site u - layers."""

    first: Ints
    second: Ints
    loss: Ints  # integer utility lost when both are off, besides what each loses

    def lost(self, on: Flags, running: Flags) -> int:
        """What an assignment loses, by which layers are on and which sites keep anything."""
        off = ~np.concatenate([on, running])
        return int(self.loss[off[self.first] & off[self.second]].sum())


def together(branch: Branch) -> Floats:
    """What is lost when two units are off besides what each loses, whole numbers; symmetric, shape
    (units, units)."""
    units = branch.layers + branch.sites
    found = np.zeros((units, units))
    if branch.pairs is not None:
        np.add.at(found, (branch.pairs.first, branch.pairs.second), branch.pairs.loss)
    return np.asarray(found + found.T)


def members(branch: Branch) -> Floats:
    """1 where a unit is a layer itself or a site of it; shape (layers, units)."""
    layers = np.arange(branch.layers)
    unit_layer = np.concatenate([layers, branch.site_layer])
    return np.asarray(layers[:, None] == unit_layer, dtype=np.float64)


def without_layer_pairs(branch: Branch) -> Branch:
    """The branch without its pairs of two layers."""
    pairs = branch.pairs
    if pairs is None:
        return branch
    left = np.maximum(pairs.first, pairs.second) >= branch.layers
    return replace(branch, pairs=Pairs(pairs.first[left], pairs.second[left], pairs.loss[left]))


def additive_bound(branch: Branch) -> Branch:
    """A branch without pairs in which every assignment is worth at least as much; tight on the LP.

    The branch's cheapest assignment must fit.
    """
    pairs = branch.pairs
    if pairs is None or not len(pairs.loss):
        return branch
    found = dual_values(branch)
    size, is_loss = np.abs(pairs.loss), pairs.loss > 0
    multiplier = size / 2 if found is None else np.clip(found[1], 0.0, size)
    taken = np.rint(multiplier).astype(np.int64)
    constant = int(taken[is_loss].sum())
    slope = np.zeros(branch.layers + branch.sites, dtype=np.int64)
    np.add.at(slope, pairs.first, np.where(is_loss, -taken, taken))
    np.add.at(slope, pairs.second, np.where(is_loss, -taken, size - taken))
    gain = branch.gain.copy()
    allowed = branch.value[:, 1:] > -np.inf
    gain[:, 1:] -= np.where(allowed, slope[branch.layers :, None], 0)
    return replace(
        branch,
        utility=branch.utility + constant + int(slope.sum()),
        layer_utility=branch.layer_utility - slope[: branch.layers],
        gain=gain,
        pairs=None,
    )

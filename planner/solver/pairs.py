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
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import scipy.sparse as sparse
from scipy.optimize import linprog

if TYPE_CHECKING:
    from planner.solver.branch import Branch


Ints = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


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
    constant = 0
    slope = np.zeros(branch.layers + branch.sites, dtype=np.int64)
    for a, b, loss, share in zip(pairs.first, pairs.second, pairs.loss, _shares(branch, pairs)):
        if loss > 0:
            taken = round(share * int(loss))
            constant += taken
            slope[a] -= taken
            slope[b] -= taken
        else:
            taken = round(share * -int(loss))
            slope[a] += taken
            slope[b] += -int(loss) - taken
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


def _shares(branch: Branch, pairs: Pairs) -> npt.NDArray[np.float64]:
    """The multiplier of each pair as a share of its size, between 0 and 1."""
    layers, count = branch.layers, len(pairs.loss)
    site, kept = np.nonzero(branch.value > -np.inf)
    shares = layers + len(site)
    size = np.abs(pairs.loss).astype(np.float64)
    unit = max(float(size.max()), float(np.abs(branch.layer_utility).max(initial=0)), 1.0)
    # 1 - on of a unit: which variables say "on".
    running = kept > 0
    says_on = sparse.csr_matrix(
        (
            np.ones(layers + int(running.sum())),
            (
                np.concatenate([np.arange(layers), layers + site[running]]),
                np.concatenate([np.arange(layers), layers + np.flatnonzero(running)]),
            ),
        ),
        shape=(layers + branch.sites, shares),
    )
    one, other = says_on[pairs.first], says_on[pairs.second]
    is_loss = pairs.loss > 0
    picked = sparse.eye(count, format="csr")
    # A loss: 1 - on_a - on_b <= z. A gain: z <= 1 - on_a and z <= 1 - on_b.
    rows = [
        sparse.hstack([-(one + other)[is_loss], -picked[is_loss]]),
        sparse.hstack([one[~is_loss], picked[~is_loss]]),
        sparse.hstack([other[~is_loss], picked[~is_loss]]),
    ]
    bounds = [np.full(is_loss.sum(), -1.0), np.ones(2 * (~is_loss).sum())]
    room = np.maximum(branch.room, 1).astype(np.float64)
    cost = np.concatenate([branch.layer_cost, branch.cost[:, site, kept]], axis=1) / room[:, None]
    rows.append(sparse.hstack([sparse.csr_matrix(cost), sparse.csr_matrix((len(room), count))]))
    bounds.append(branch.room / room)
    sums = sparse.csr_matrix(
        (
            np.concatenate([np.ones(len(site)), -np.ones(branch.sites)]),
            (
                np.concatenate([site, branch.site_index]),
                np.concatenate([layers + np.arange(len(site)), branch.site_layer]),
            ),
        ),
        shape=(branch.sites, shares + count),
    )
    worth = np.concatenate([branch.layer_utility, branch.gain[site, kept], -pairs.loss]) / unit
    # The stubs of this function name no sparse matrices.
    solver: Any = linprog
    found = solver(
        -worth,
        A_ub=sparse.vstack(rows, format="csr"),
        b_ub=np.concatenate(bounds),
        A_eq=sums if branch.sites else None,
        b_eq=np.zeros(branch.sites) if branch.sites else None,
        bounds=[
            *((0.0 if optional else 1.0, 1.0) for optional in branch.optional),
            *[(0.0, 1.0)] * (len(site) + count),
        ],
        method="highs-ds",
    )
    if found.x is None:
        return np.full(count, 0.5)
    dual = -np.asarray(found.ineqlin.marginals) * unit
    multiplier = np.empty(count)
    losses = int(is_loss.sum())
    multiplier[is_loss] = dual[:losses]
    multiplier[~is_loss] = dual[losses : losses + count - losses]
    return np.clip(multiplier / np.maximum(size, 1.0), 0.0, 1.0)

"""From prices to a feasible assignment: round down or fill up, then improve by moves and exchanges.

A move sets one site to another count, or switches one layer. A move that helps and fits the slack
is taken; when there is none left, an exchange makes room with one move and uses it with another.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from planner.solver.branch import FORBIDDEN, Assignment, Branch
from planner.solver.pairs import members, together
from planner.solver.problem import Costs, Floats, Ints
from planner.solver.relaxation import Relaxation, relax

# An exchange looks at this many of the most promising moves of either kind.
_EXCHANGED = 128
_ROUNDS = 100
_SMALLEST_RISE = 2.0**-24
_BISECTIONS = 10


def round_down(branch: Branch, relaxation: Relaxation) -> Assignment:
    """What the relaxation takes once its prices are raised, in proportion, until that fits.

    The branch's cheapest assignment must fit.
    """
    if branch.fits(relaxation.assignment.cost):
        return relaxation.assignment
    best = branch.cheapest()
    # Most often prices a trifle higher are enough, so the bisection is of the logarithm.
    low, high = _SMALLEST_RISE, 1.0 / _SMALLEST_RISE
    for _ in range(_BISECTIONS):
        rise = math.sqrt(low * high)
        taken = relax(branch, relaxation.prices * (1.0 + rise)).assignment
        if branch.fits(taken.cost):
            high = rise
            best = max(best, taken, key=lambda assignment: assignment.utility)
        else:
            low = rise
    return best


def fill(branch: Branch, start: Assignment, prices: Floats) -> Assignment:
    """Add switches to running sites, the most useful for their price first, while they fit.

    `start` must fit; so does what is returned. A site of which a switch does not fit gets no more.
    """
    gain, cost = np.diff(branch.gain, axis=1), np.diff(branch.cost, axis=2)
    steps = np.arange(gain.shape[1])
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = np.where(gain > 0, gain / np.tensordot(prices, cost, 1), 0.0)
    slope[steps < start.counts[:, None]] = np.inf
    # A step comes no earlier than the one it builds on, wherever rounding puts it.
    slope = np.minimum.accumulate(slope, axis=1)
    is_open = (steps >= start.counts[:, None]) & start.on[branch.site_layer][:, None]
    left = np.flatnonzero(is_open & (slope > 0))
    left = left[np.argsort(-slope.ravel()[left], kind="stable")]
    cost, slack = cost.reshape(len(cost), gain.size), branch.room - start.cost
    counts = start.counts.copy()
    while len(left):
        spent = cost[:, left].cumsum(axis=1)
        taken = int((spent <= slack[:, None]).all(axis=0).cumprod().sum())
        if taken:
            counts += np.bincount(left[:taken] // len(steps), minlength=branch.sites)
            slack = slack - spent[:, taken - 1]
        left = left[taken:]
        closed = np.zeros(branch.sites, dtype=bool)
        closed[left[(cost[:, left] > slack[:, None]).any(axis=0)] // len(steps)] = True
        left = left[~closed[left // len(steps)]]
    return branch.assign(start.on, counts)


def improve(
    branch: Branch,
    start: Assignment,
    prices: Floats,
    entry: Ints,
    deadline: float = math.inf,
) -> Assignment:
    """Apply the best move, or else the best exchange, that fits, until none helps.

    `start` must fit; so does what is returned, and it is worth at least as much. Prices, shape
    (metrics,), rank the moves; counts of `entry`, (sites,), fill a layer switched on. It stops at
    the deadline, on `time.perf_counter`'s clock, with what it has.
    """
    entry = np.maximum(entry, branch.minimum)
    current = start
    for _ in range(_ROUNDS):
        if time.perf_counter() > deadline:
            break
        slack = branch.room - current.cost
        moves = _moves(branch, current, entry)
        loss = prices @ moves.cost - moves.utility
        chosen = _best_single(moves, loss, slack) or _best_exchange(moves, loss, slack)
        if not chosen:
            return current
        on, counts = current.on.copy(), current.counts.copy()
        for move in chosen:
            layer, site, count = moves.layer[move], moves.site[move], moves.count[move]
            if site >= 0:
                counts[site] = count
            else:
                on[layer] = count
                inside = branch.site_layer == layer
                counts[inside] = entry[inside]
        found = branch.assign(on, counts)
        # What moves are worth does not count what the two of an exchange do to each other in pairs.
        if found.utility <= current.utility:
            return current
        current = found
    return current


@dataclass(frozen=True, eq=False)
class _Moves:
    """Changes of one site or layer each."""

    utility: Ints  # (moves,): change of utility
    cost: Costs  # (metrics, moves): change of cost
    layer: npt.NDArray[np.intp]  # (moves,)
    site: npt.NDArray[np.intp]  # (moves,); -1 where the whole layer is switched
    count: Ints  # (moves,): the new count of the site, or 1 and 0 for a layer on and off


def _moves(branch: Branch, current: Assignment, entry: Ints) -> _Moves:
    """Every other count of every running site, and every optional layer the other way."""
    rows = branch.site_index
    allowed = (branch.gain > FORBIDDEN) & current.on[branch.site_layer][:, None]
    allowed[rows, current.counts] = False
    site, count = np.nonzero(allowed)
    utility = branch.gain[site, count] - branch.gain[site, current.counts[site]]
    cost = branch.cost[:, site, count] - branch.cost[:, site, current.counts[site]]

    inside = np.where(current.on[branch.site_layer], current.counts, entry)
    layer_utility, layer_cost = branch.layer_totals(inside)
    layer = np.flatnonzero(branch.optional)
    direction = np.where(current.on[layer], -1, 1)
    layer_utility = layer_utility[layer] * direction
    if branch.pairs is not None:
        of_sites, of_layers = _of_pairs(branch, current, inside)
        utility += of_sites[site] * ((count > 0) * 1 - (current.counts[site] > 0))
        layer_utility += of_layers[layer]
    return _Moves(
        utility=np.concatenate([utility, layer_utility]),
        cost=np.concatenate([cost, layer_cost[:, layer] * direction], axis=1),
        layer=np.concatenate([branch.site_layer[site], layer]),
        site=np.concatenate([site, np.full(len(layer), -1)]),
        count=np.concatenate([count, ~current.on[layer]]),
    )


def _of_pairs(branch: Branch, current: Assignment, inside: Ints) -> tuple[Ints, Ints]:
    """What pairs lose less when a site keeps something again, (sites,), and when a layer, with what
    it has `inside`, is switched the other way, (layers,)."""
    losses, of_layer = together(branch), members(branch)
    off = ~np.concatenate([current.on, current.counts > 0])
    lost = losses @ off
    changed = of_layer * np.concatenate([np.ones(branch.layers), inside > 0])
    own = ((changed @ losses) * changed).sum(axis=1) / 2
    switched = changed @ lost * np.where(current.on, -1.0, 1.0) - own
    return lost[branch.layers :].astype(np.int64), switched.astype(np.int64)


def _best_single(moves: _Moves, loss: Floats, slack: Costs) -> tuple[int, ...]:
    """The fitting, helpful move that loses least; of equals, the most useful."""
    helpful = np.flatnonzero((moves.utility > 0) & (moves.cost <= slack[:, None]).all(axis=0))
    if not len(helpful):
        return ()
    order = np.lexsort((-moves.utility[helpful], loss[helpful]))
    return (int(helpful[order[0]]),)


def _best_exchange(moves: _Moves, loss: Floats, slack: Costs) -> tuple[int, ...]:
    """The pair of a move that is worth something and one that makes room for it."""
    order = np.argsort(loss, kind="stable")
    up = order[moves.utility[order] > 0][:_EXCHANGED]
    down = order[moves.utility[order] <= 0][:_EXCHANGED]
    utility = moves.utility[up][:, None] + moves.utility[down]
    possible = utility > 0
    for cost, left in zip(moves.cost, slack.tolist()):
        possible &= cost[up][:, None] + cost[down] <= left
    whole = (moves.site[up] < 0)[:, None] | (moves.site[down] < 0)
    possible &= moves.site[up][:, None] != moves.site[down]
    possible &= ~(whole & (moves.layer[up][:, None] == moves.layer[down]))
    if not possible.any():
        return ()
    first, second = np.unravel_index(np.where(possible, utility, 0).argmax(), utility.shape)
    return int(up[first]), int(down[second])

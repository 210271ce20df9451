"""Branch and bound over which layers are on, where pairs of layers are lost together.

At given prices everything but pairs decides by itself (`relaxation`), so what a set of layers is
worth at most is

    L(on) = utility + prices . room + sum of worth of layers on - losses of pairs that are off.

Layers are decided one after the other, many partial sets at once. A set that is decided in part is
worth at most what is decided, plus for each open layer the better of on and off, with the open
pairs shared out between their two layers (see `pairs`). Sets that reach the target become branches
of their own, in which no layer is open and pairs of layers are a constant.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from planner.solver.branch import FORBIDDEN, Assignment, Branch
from planner.solver.pairs import Pairs, together
from planner.solver.problem import Flags, Floats
from planner.solver.relaxation import relax

# Partial sets looked at together.
_CHUNK = 1 << 14
# Prices at which a set is judged, over those of the branch.
_RISES = (0.5, 0.7, 0.85, 1.0, 1.15, 1.4, 2.0)


@dataclass(frozen=True)
class LayerSets:
    """Which sets of layers are worth at least something; `complete` unless there are too many."""

    on: Flags  # (sets, layers), the highest bound first
    bound: Floats  # (sets,)
    complete: bool


def pairs_of_layers(branch: Branch) -> Floats:
    """What is lost when two layers are off, shape (layers, layers), symmetric."""
    return together(branch)[: branch.layers, : branch.layers]


def layer_sets(branch: Branch, above: Branch, prices: Floats, target: int, most: int) -> LayerSets:
    """Sets of layers that are worth at least `target`, in integer utility, at some prices,
    (metrics,).

    In `above` pairs other than of layers are bounded (`pairs.additive_bound`). Of more than `most`
    sets the best are given back, not completely.
    """
    losses = pairs_of_layers(branch)
    relaxation = relax(above, prices)
    constant = above.utility + float(prices @ above.room) + relaxation.margin
    found = _search(relaxation.worth, above.optional, losses, constant, target, most)
    if not found.complete or not len(found.on):
        return found
    bound = found.bound
    off = ~found.on
    lost = 0.5 * np.einsum("si,ij,sj->s", off, losses, off)
    for rise in _RISES:
        other = relax(above, prices * rise)
        constant = above.utility + float(prices @ above.room) * rise + other.margin
        bound = np.minimum(bound, constant + found.on @ other.worth - lost)
    order = np.argsort(-bound, kind="stable")
    order = order[bound[order] >= target]
    return LayerSets(found.on[order], bound[order], True)


def tightest(branch: Branch, above: Branch, prices: Floats, target: int) -> Floats:
    """Of prices in proportion to given ones, those at which the best set is worth least."""

    def best(rise: float) -> float:
        found = layer_sets(branch, above, prices * rise, target, 1)
        return float(found.bound.max(initial=target - 1))

    return prices * min((1.0, *_RISES), key=best)


def _search(
    worth: Floats, optional: Flags, losses: Floats, constant: float, target: int, most: int
) -> LayerSets:
    """All sets worth at least `target` in layers and pairs alone, or the best ones met."""
    layers = len(worth)
    # What matters most is decided first: bounds fall soonest.
    order = np.argsort(-(np.abs(losses).sum(axis=1) + np.abs(worth)) * optional, kind="stable")
    losses = losses[np.ix_(order, order)]
    worth, optional = worth[order], optional[order]
    off_worth = np.where(optional, 0.0, -np.inf)
    # Half of the gain of every open pair is granted to each of its layers where it is off.
    gains = np.maximum(-losses, 0.0) / 2
    # [k, j]: gains of layer j with layers from k on.
    open_gain = np.array([gains[:, k:].sum(axis=1) for k in range(layers + 1)])
    stack = [(0, np.zeros((1, layers), dtype=bool), np.zeros(1), np.zeros((1, layers)))]
    sets: list[Flags] = []
    values: list[Floats] = []
    kept, floor = 0, float(target) - constant
    complete = True
    while stack:
        depth, on, value, lost = stack.pop()
        if depth == layers:
            sets.append(on)
            values.append(value)
            kept += len(value)
            if kept > most:
                complete = False
                known = np.concatenate(values)
                best = np.argsort(-known, kind="stable")[:most]
                sets, values = [np.concatenate(sets)[best]], [known[best]]
                kept, floor = most, float(values[0][-1])
            continue
        # `lost`: (sets, layers), what a layer loses with those that are off already.
        children = []
        for is_on in (True, False):
            gained = worth[depth] if is_on else off_worth[depth] - lost[:, depth]
            new = value + gained
            loss = lost if is_on else lost + losses[depth]
            rest = slice(depth + 1, layers)
            least = off_worth[rest] - loss[:, rest] + open_gain[depth + 1, rest]
            ceiling = new + np.maximum(worth[rest], least).sum(axis=1)
            good = ceiling >= floor
            if good.any():
                flags = on[good].copy()
                flags[:, depth] = is_on
                children.append((flags, new[good], loss[good]))
        if not children:
            continue
        flags, new, loss = (np.concatenate(parts) for parts in zip(*children, strict=True))
        # Depth first, the most promising chunk first.
        rank = np.argsort(new, kind="stable")
        for start in range(0, len(rank), _CHUNK):
            part = rank[start : start + _CHUNK]
            stack.append((depth + 1, flags[part], new[part], loss[part]))
    if not sets:
        return LayerSets(np.zeros((0, layers), dtype=bool), np.zeros(0), complete)
    whole, value = np.concatenate(sets), np.concatenate(values) + constant
    best = np.argsort(-value, kind="stable")
    back = np.empty(layers, dtype=np.int64)
    back[order] = np.arange(layers)
    return LayerSets(whole[best][:, back], value[best], complete)


def with_layers(branch: Branch, on: Flags) -> Branch:
    """The branch with a set of layers on and all others gone; what pairs lose by that is counted.

    Its layers and sites are those of the branch that are left, in their order.
    """
    left, sites = np.flatnonzero(on), np.flatnonzero(on[branch.site_layer])
    place = np.cumsum(on) - 1
    utility, gain, pairs = branch.utility, branch.gain.copy(), None
    if branch.pairs is not None:
        first, second, loss = branch.pairs.first, branch.pairs.second, branch.pairs.loss
        is_off = np.concatenate([~on, ~on[branch.site_layer]])
        is_open = np.concatenate([np.zeros(branch.layers, bool), on[branch.site_layer]])
        may_be_none = np.concatenate([np.zeros(branch.layers, bool), gain[:, 0] > FORBIDDEN])
        utility -= int(loss[is_off[first] & is_off[second]].sum())
        for one, other in ((first, second), (second, first)):
            # One is gone: the other, a site, loses where it keeps nothing.
            due = is_off[one] & is_open[other] & may_be_none[other]
            np.subtract.at(gain[:, 0], other[due] - branch.layers, loss[due])
        if (both := is_open[first] & is_open[second]).any():
            units = np.full(branch.layers + branch.sites, -1)
            units[branch.layers + sites] = len(left) + np.arange(len(sites))
            pairs = Pairs(units[first[both]], units[second[both]], loss[both])
    return Branch(
        utility=utility,
        room=branch.room,
        optional=np.zeros(len(left), dtype=bool),
        layer_utility=branch.layer_utility[left],
        layer_cost=branch.layer_cost[:, left],
        site_layer=place[branch.site_layer[sites]],
        gain=gain[sites],
        cost=branch.cost[:, sites],
        pairs=pairs,
    )


def lifted(branch: Branch, on: Flags, assignment: Assignment) -> Assignment:
    """An assignment of `with_layers` as one of the branch."""
    counts = np.zeros(branch.sites, dtype=np.int64)
    counts[on[branch.site_layer]] = assignment.counts
    return branch.assign(on, counts)

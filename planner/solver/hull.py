"""The concave frontier of a branch in one metric: utility against cost, layer by layer, merged.

A site's frontier is the upper hull of its (cost, gain) points. A layer's is the merge of its sites'
by falling slope; where the layer may be off, the first stretch, as long as it raises the average
slope from zero, becomes one segment that switches the layer on. The merge of all layers solves the
linear relaxation of the branch: a prefix is its optimum at the prefix's cost (Sinha and Zoltners
1979, doi:10.1287/opre.27.3.503).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from planner.solver.branch import FORBIDDEN, Assignment, Branch, Ints
from planner.solver.problem import Costs


@dataclass(frozen=True)
class _Segment:
    """One stretch of a frontier: a site goes to a count, or, if `site` is -1, a layer goes on."""

    slope: float
    cost: tuple[int, ...]
    gain: int
    layer: int
    site: int
    count: int


@dataclass(frozen=True, eq=False)
class Hull:
    """The merged frontier of one branch."""

    branch: Branch
    metric: int  # its index
    slope: npt.NDArray[np.float64]  # (segments,): utility per unit of cost, falling
    cost: Costs  # (metrics, segments + 1): of the first n segments
    utility: Ints  # (segments + 1,): of the first n segments
    _segments: list[_Segment]
    _entry: Ints

    @staticmethod
    def of(branch: Branch, metric: int) -> Hull:
        """The frontier of a branch in one metric."""
        entry = branch.minimum.copy()
        ranked: list[tuple[float, _Segment]] = []
        for layer in range(branch.layers):
            own = []
            for site in np.flatnonzero(branch.site_layer == layer).tolist():
                counts = _upper_hull(branch, metric, site)
                entry[site] = counts[0]
                own += [_step(branch, metric, site, *pair) for pair in pairwise(counts)]
            own.sort(key=lambda segment: -segment.slope)
            if branch.optional[layer]:
                own = _with_entry(branch, metric, layer, entry, own)
            # Rounding must not put a segment before one that it builds on.
            slopes = np.minimum.accumulate([segment.slope for segment in own])
            ranked += zip(slopes.tolist(), own)
        ranked.sort(key=lambda pair: -pair[0])
        segments = [segment for _, segment in ranked]
        base = branch.assign(~branch.optional, entry)
        gains = [base.utility, *(segment.gain for segment in segments)]
        costs = [tuple(base.cost.tolist()), *(segment.cost for segment in segments)]
        return Hull(
            branch=branch,
            metric=metric,
            slope=np.array([slope for slope, _ in ranked], dtype=np.float64),
            cost=np.cumsum(np.array(costs, dtype=np.int64), axis=0).T,
            utility=np.cumsum(np.array(gains, dtype=np.int64)),
            _segments=segments,
            _entry=entry,
        )

    def bound(self, room: int) -> int:
        """No assignment whose cost in the hull's metric is within `room` is worth more."""
        taken = self._prefix(room)
        value = int(self.utility[taken])
        if taken < len(self._segments):
            rest, last = room - int(self.cost[self.metric, taken]), self._segments[taken]
            value += -(-rest * last.gain // last.cost[self.metric])
        # Slopes are rounded, so the order may be off by their rounding.
        return value + (self.branch.largest_utility >> 44) + 1

    def price(self, room: int) -> float:
        """Utility per unit of cost of the segment that ends a room."""
        taken = self._prefix(room)
        return float(self.slope[taken]) if taken < len(self._segments) else 0.0

    def assignment(self, room: Costs) -> Assignment:
        """The longest prefix that fits a room, shape (metrics,)."""
        fitting = (self.cost <= room[:, None]).all(axis=0)
        if not fitting.any():
            # What is free in the hull's metric may be too much in another.
            return self.branch.cheapest()
        on, counts = ~self.branch.optional, self._entry.copy()
        for segment in self._segments[: int(fitting.sum()) - 1]:
            if segment.site < 0:
                on[segment.layer] = True
            else:
                counts[segment.site] = segment.count
        return self.branch.assign(on, counts)

    def _prefix(self, room: int) -> int:
        return int(np.searchsorted(self.cost[self.metric], room, side="right")) - 1


def _upper_hull(branch: Branch, metric: int, site: int) -> list[int]:
    """The counts at the corners of a site's frontier, ascending; the first costs least."""
    gain, cost = branch.gain[site].tolist(), branch.cost[metric, site].tolist()
    corners: list[int] = []
    for count in range(len(gain)):
        if gain[count] == FORBIDDEN or (corners and gain[count] <= gain[corners[-1]]):
            continue
        while corners and cost[count] == cost[corners[-1]]:
            corners.pop()
        while len(corners) > 1:
            before, last = corners[-2:]
            rise, run = gain[last] - gain[before], cost[last] - cost[before]
            if rise * (cost[count] - cost[last]) > (gain[count] - gain[last]) * run:
                break
            corners.pop()
        corners.append(count)
    return corners


def _step(branch: Branch, metric: int, site: int, before: int, after: int) -> _Segment:
    gain = int(branch.gain[site, after] - branch.gain[site, before])
    cost = (branch.cost[:, site, after] - branch.cost[:, site, before]).tolist()
    return _Segment(
        slope=_slope(gain, cost[metric]),
        cost=tuple(cost),
        gain=gain,
        layer=int(branch.site_layer[site]),
        site=site,
        count=after,
    )


def _with_entry(
    branch: Branch, metric: int, layer: int, entry: Ints, segments: list[_Segment]
) -> list[_Segment]:
    """A layer's segments with those that are worth entering for made one; updates `entry`."""
    inside = branch.site_layer == layer
    gain = int(branch.layer_utility[layer])
    gain += int(branch.gain[branch.site_index, entry][inside].sum())
    cost = branch.layer_cost[:, layer] + branch.cost[:, branch.site_index, entry][:, inside].sum(1)
    absorbed = 0
    for segment in segments:
        if gain > 0 and gain * segment.cost[metric] >= segment.gain * int(cost[metric]):
            break
        gain += segment.gain
        cost = cost + segment.cost
        entry[segment.site] = segment.count
        absorbed += 1
    if gain <= 0:
        return []
    prices = tuple(cost.tolist())
    switch = _Segment(_slope(gain, prices[metric]), prices, gain, layer, -1, 0)
    return [switch, *segments[absorbed:]]


def _slope(gain: int, cost: int) -> float:
    return gain / cost if cost else np.inf

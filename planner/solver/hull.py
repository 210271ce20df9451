"""The concave frontier of a branch: utility against cost in its first metric, layers merged.

A site's frontier is the upper hull of its (cost, gain) points. A layer's is the merge of its sites'
by falling slope; where the layer may be off, the first stretch, as long as it raises the average
slope from zero, becomes one segment that switches the layer on. The merge of all layers solves the
linear relaxation of the branch: a prefix is its optimum at the prefix's cost (Sinha and Zoltners
1979, doi:10.1287/opre.27.3.503).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np

from planner.solver.branch import FORBIDDEN, Branch
from planner.solver.problem import Costs, Flags, Ints


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
    """The merged frontier of one branch in its first metric."""

    branch: Branch
    cost: Costs  # (metrics, segments + 1): of the first n segments
    utility: Ints  # (segments + 1,): of the first n segments
    _segments: list[_Segment]
    _entry: Ints

    @staticmethod
    def of(branch: Branch) -> Hull:
        """The frontier of a branch."""
        entry = branch.minimum.copy()
        ranked: list[tuple[float, _Segment]] = []
        for layer in range(branch.layers):
            own = []
            for site in np.flatnonzero(branch.site_layer == layer).tolist():
                counts = _upper_hull(branch, site)
                entry[site] = counts[0]
                own += [_step(branch, site, *pair) for pair in pairwise(counts)]
            own.sort(key=lambda segment: -segment.slope)
            if branch.optional[layer]:
                own = _with_entry(branch, layer, entry, own)
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
            cost=np.cumsum(np.array(costs, dtype=np.int64), axis=0).T,
            utility=np.cumsum(np.array(gains, dtype=np.int64)),
            _segments=segments,
            _entry=entry,
        )

    def first(self, count: int) -> tuple[Flags, Ints]:
        """Which layers are on, and how much sites keep, where so many segments are taken."""
        on, counts = ~self.branch.optional, self._entry.copy()
        layers, sites, kept = self._steps[:, :count]
        on[layers[sites < 0]] = True
        # Of a site that is taken several times the last counts.
        counts[sites[sites >= 0]] = kept[sites >= 0]
        return on, counts

    @cached_property
    def _steps(self) -> Ints:
        """Layer, site and count of every segment; shape (3, segments)."""
        found = [(segment.layer, segment.site, segment.count) for segment in self._segments]
        return np.array(found, dtype=np.int64).reshape(-1, 3).T


def _upper_hull(branch: Branch, site: int) -> list[int]:
    """The counts at the corners of a site's frontier, ascending; the first costs least."""
    gain, cost = branch.gain[site].tolist(), branch.cost[0, site].tolist()
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


def _step(branch: Branch, site: int, before: int, after: int) -> _Segment:
    gain = int(branch.gain[site, after] - branch.gain[site, before])
    cost = (branch.cost[:, site, after] - branch.cost[:, site, before]).tolist()
    return _Segment(
        slope=_slope(gain, cost[0]),
        cost=tuple(cost),
        gain=gain,
        layer=int(branch.site_layer[site]),
        site=site,
        count=after,
    )


def _with_entry(
    branch: Branch, layer: int, entry: Ints, segments: list[_Segment]
) -> list[_Segment]:
    """A layer's segments with those that are worth entering for made one; updates `entry`."""
    inside = branch.site_layer == layer
    gain = int(branch.layer_utility[layer])
    gain += int(branch.gain[branch.site_index, entry][inside].sum())
    cost = branch.layer_cost[:, layer] + branch.cost[:, branch.site_index, entry][:, inside].sum(1)
    absorbed = 0
    for segment in segments:
        if gain > 0 and gain * segment.cost[0] >= segment.gain * int(cost[0]):
            break
        gain += segment.gain
        cost = cost + segment.cost
        entry[segment.site] = segment.count
        absorbed += 1
    if gain <= 0:
        return []
    prices = tuple(cost.tolist())
    switch = _Segment(_slope(gain, prices[0]), prices, gain, layer, -1, 0)
    return [switch, *segments[absorbed:]]


def _slope(gain: int, cost: int) -> float:
    return gain / cost if cost else np.inf

"""What can be chosen at all: whatever fits no limit is worth nothing to a search.

A layer worth 10^15 that no choice can afford would otherwise coarsen the scale of everything that
can be chosen, and make the distance from a bound look small beside it.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from planner.solver.problem import Costs, Flags, LayerChoices, Problem, SiteChoices


def within_reach(problem: Problem) -> Problem:
    """The problem with the utilities of what no feasible choice keeps taken away.

    Feasible choices are the same, and are worth the same.
    """
    room = problem.limits - problem.smallest_costs()  # (options, metrics)
    possible = np.asarray((room >= 0).all(axis=1))
    tokens = tuple(
        token if fits else replace(token, utility=0.0)
        for token, fits in zip(problem.tokens, possible.tolist(), strict=True)
    )
    layers = tuple(_layer(layer, room, possible) for layer in problem.layers)
    return replace(problem, tokens=tokens, layers=layers)


def _layer(layer: LayerChoices, room: Costs, possible: Flags) -> LayerChoices:
    """A layer with what is left of it.

    `room`: what the cheapest choice of each option leaves, shape (options, metrics).
    `possible`: whether an option has any choice, shape (options,).
    """
    if layer.optional:
        entry = layer.costs + sum(site.costs[:, :, site.minimum] for site in layer.sites)
        room = room - entry
        possible = possible & (room >= 0).all(axis=1)
    sites = tuple(_site(site, room[possible], site.costs[possible]) for site in layer.sites)
    return replace(layer, utility=layer.utility if possible.any() else 0.0, sites=sites)


def _site(site: SiteChoices, room: Costs, costs: Costs) -> SiteChoices:
    """A site whose switches beyond the most that fit are worth no more, and no less, than needed.

    `room`: what a choice with the fewest switches leaves, shape (possible options, metrics).
    `costs`: of the site in these options, shape (possible options, metrics, switches + 1).
    """
    extra = costs - costs[:, :, site.minimum, None]
    fits = (extra <= room[:, :, None]).all(axis=1)
    most = int(fits.sum(axis=1).max(initial=1)) - 1
    if most == 0:
        return replace(site, utilities=np.zeros_like(site.utilities))
    # The best switches are kept first: only worse ones are out of reach, and must stay worse.
    worst = np.partition(site.utilities, site.switches - most)[site.switches - most]
    return replace(site, utilities=np.maximum(site.utilities, min(0.0, worst)))

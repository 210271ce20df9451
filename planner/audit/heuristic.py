"""The fast way from utilities to a plan: switches by worth per cost while they fit."""

from __future__ import annotations

import numpy as np

from planner.flags import Flags, flags_of
from planner.problem import LayerChoices, Problem, SiteChoices
from planner.solver import Scores, take_while_fits

__all__ = ["decide"]


def decide(problem: Problem) -> Flags:
    """Take switches by utility per cost while they fit, none that is worth less than nothing.

    A layer with sites ranks as high as the best switch in it.

    Args:
        problem: with one metric and one token option.

    Returns:
        Shape (switches,), in the order of `planner.flags`.

    Raises:
        Infeasible: if no choice respects the limit.
    """
    sites = {site.name: _per_cost(site) for site in problem.sites}
    layers = np.array([_layer_score(layer, sites) for layer in problem.layers])
    flags = flags_of(problem, take_while_fits(problem, Scores(np.zeros(1), layers, sites)))
    place = 0
    for layer in problem.layers:
        if layer.optional:
            alone = not layer.sites
            flags[place] &= not (alone and layer.utility < 0)
            place += 1
        for site in layer.sites:
            wanted = site.utilities >= 0
            # A minimum is kept to even where it does harm.
            if (wanted & flags[place : place + site.switches]).sum() >= site.minimum:
                flags[place : place + site.switches] &= wanted
            place += site.switches
    return flags


def _per_cost(site: SiteChoices) -> np.ndarray:
    table = site.costs[0, 0]
    cost = (table[-1] - table[0]) / max(site.switches, 1)
    per_cost: np.ndarray = site.utilities / max(cost, 1e-300)
    return per_cost


def _layer_score(layer: LayerChoices, sites: dict[str, np.ndarray]) -> float:
    if layer.sites:
        return max((float(v) for site in layer.sites for v in sites[site.name]), default=0.0)
    return layer.utility / max(float(layer.costs[0, 0]), 1e-300)

"""The fast way from measured utilities to a plan: switches by worth per cost while they fit."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from planner.solver import Scores, take_while_fits
from planner.solver.problem import Flags, LayerChoices, Problem, SiteChoices

# How far below 0 a utility must be, in mean sizes of utilities, to be worth next to nothing.
_SOFTNESS = 0.05


def worth(utilities: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Measured utilities made positive, in the same order: what plans are decided by.

    For one sample the loss often falls when a switch is off by itself. But several such switches
    off together mostly do harm, so leaving them off beyond need makes plans worse (docs/audit.md
    has figures). Here they are worth a little: a plan uses its whole limit, those switches last.

    `utilities`: of a sample each, shape (..., switches). The result is a softplus, nearly
    max(utilities, 0).
    """
    size = np.abs(utilities).mean(axis=-1, keepdims=True)
    softness = np.where(size > 1e-300, _SOFTNESS * size, 1.0)
    positive: npt.NDArray[np.float64] = softness * np.logaddexp(0, utilities / softness)
    return positive


def decide(problem: Problem) -> Flags:
    """Take switches by utility per cost while they fit; Infeasible where none do.

    A layer with sites ranks as high as the best switch in it. `problem` has one metric and one
    token option.
    """
    sites = {site.name: _per_cost(site) for site in problem.sites}
    layers = np.array([_layer_score(layer, sites) for layer in problem.layers])
    return problem.flags_of(take_while_fits(problem, Scores(np.zeros(1), layers, sites)))


def _per_cost(site: SiteChoices) -> np.ndarray:
    table = site.costs[0, 0]
    cost = (table[-1] - table[0]) / max(site.switches, 1)
    per_cost: np.ndarray = site.utilities / max(cost, 1e-300)
    return per_cost


def _layer_score(layer: LayerChoices, sites: dict[str, np.ndarray]) -> float:
    if layer.sites:
        return max((float(v) for site in layer.sites for v in sites[site.name]), default=0.0)
    return layer.utility / max(float(layer.costs[0, 0]), 1e-300)

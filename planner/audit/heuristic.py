"""The fast way from measured utilities to a plan: switches by worth per cost while they fit."""

from __future__ import annotations

import numpy as np

from planner.solver import take_while_fits
from planner.solver.problem import Flags, Floats, Problem

# How far below 0 a utility must be, in mean sizes of utilities, to be worth next to nothing.
_SOFTNESS = 0.05


def worth(utilities: Floats) -> Floats:
    """Measured utilities made positive, in the same order: what plans are decided by.

    For one sample the loss often falls when a switch is off by itself. But several such switches
    off together mostly do harm, so leaving them off beyond need makes plans worse (docs/audit.md
    has figures). Here they are worth a little: a plan uses its whole limit, those switches last.

    `utilities`: of a sample each, shape (..., switches). The result is a softplus, nearly
    max(utilities, 0).
    """
    size = np.abs(utilities).mean(axis=-1, keepdims=True)
    softness = np.where(size > 1e-300, _SOFTNESS * size, 1.0)
    positive: Floats = softness * np.logaddexp(0, utilities / softness)
    return positive


def decide(problem: Problem) -> Flags:
    """Take switches by utility per cost while they fit; Infeasible where none do.

    A layer with sites ranks as high as the best switch in it. `problem` has one metric and one
    token option.
    """
    scores = [np.zeros(0)]
    for layer in problem.layers:
        sites = [_per_cost(s.utilities, np.ptp(s.costs) / max(s.switches, 1)) for s in layer.sites]
        inside = np.concatenate([np.zeros(0), *sites])
        if layer.optional:
            alone = _per_cost(np.array([layer.utility]), layer.costs[0, 0])
            scores.append(inside.max(keepdims=True) if inside.size else alone)
        scores.append(inside)
    return problem.flags_of(take_while_fits(problem.with_utilities(np.concatenate(scores))))


def _per_cost(utilities: Floats, cost: float) -> Floats:
    return utilities / max(cost, 1e-300)

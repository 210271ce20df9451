"""Worth by the size of weights: no data, no pass of the model.

A switch is worth the squared norm of its columns in the site's last linear times that of its rows
in the linears before, as share of the whole site (Li et al., "Pruning filters for efficient
convnets", arXiv 1608.08710, for both ends of what is cut), scaled by the site's size beside all
others'.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch

from planner.ir.graph import Graph
from planner.models.running.bindings import BoundLayer, BoundLinear, BoundSite
from planner.solver.problem import Floats


def magnitude_worth(graph: Graph, layers: Sequence[BoundLayer]) -> dict[str, Floats]:
    """Utilities of all switches; no unit.

    `graph`: with switches assigned. `layers`: of the loaded model.
    """
    worth: dict[str, Floats] = {}
    for layer in layers:
        for site in (layer.heads, layer.mlp):
            if site is not None and not site.obstacle:
                bounds = graph.sites_by_name[site.site.name].bounds
                worth[site.site.name] = np.array([_norm(site, pair) for pair in pairwise(bounds)])
    for own in graph.sites_of("layer"):
        inside = [s.name for s in graph.sites_at(own.layer) if s.name in worth]
        worth[own.name] = np.array([sum(worth[name].sum() for name in inside)])
    return worth


def _norm(site: BoundSite, lanes: tuple[int, int]) -> float:
    """Product of the norms of what goes into some lanes and of what comes out of them."""
    sources = [_square(linear, lanes) for linear in site.linears if linear is not site.sink]
    return float(np.sqrt(np.mean(sources or [1.0]) * _square(site.sink, lanes)))


@torch.no_grad()
def _square(linear: BoundLinear, lanes: tuple[int, int]) -> float:
    axis = 0 if linear.binding.axis == "out" else 1
    runs = linear.runs((lanes,)) if lanes[1] > lanes[0] else ()
    parts = [linear.weight.narrow(axis, a, b - a).double().square().sum() for a, b in runs]
    return float(sum(parts))

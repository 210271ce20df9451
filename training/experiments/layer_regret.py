"""How well utilities tell which layers may go: rank correlation and regret over sets of layers.

Tried are the sets that plans leave off, sets that differ from one of them in one layer, and random
ones of as many layers. The truth is the KL divergence from the base model on passages that nobody
has measured utilities on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np
from scipy.stats import spearmanr
from torch import nn

from planner.ir.graph import Graph, Site
from planner.models.calibration.pair_losses import layer_losses
from planner.models.calibration.replay import Replay
from planner.models.calibration.samples import Sample
from planner.models.running.masked import MaskedExecutor
from planner.planning.utilities import Utilities
from planner.solver.problem import Floats

Layers = tuple[int, ...]
# Sets at one layer's distance from each plan's, random sets, and how many are measured at once.
NEIGHBOURS, RANDOM, _BATCH = 15, 16, 16


def layer_regret(
    model: nn.Module,
    graph: Graph,
    samples: Sequence[Sample],
    known: Mapping[str, Utilities],
    off: Sequence[Layers],
    seed: int = 0,
) -> dict[str, Any]:
    """Predicted against true losses of sets of layers.

    Args:
        model: dense, in evaluation mode.
        samples: to judge on.
        off: layers that each plan by them leaves off.

    Returns:
        ``sets``, the number tried; ``best``, the least loss of any, in nats per token; and
        ``utilities``: name -> ``rank`` (Spearman), ``loss`` of the set that is predicted to lose
        least, and ``regret``, that less the best.
    """
    sites = graph.sites_of("layer")
    sets = tried_sets(off, len(sites), seed)
    masked = MaskedExecutor(model, graph)
    losses = np.mean(
        [
            layer_losses(masked, Replay(model, masked.layers, sample, _BATCH), sites, sets)
            for sample in samples
        ],
        axis=0,
    )
    best = float(losses.min())
    found = {}
    for name, utilities in known.items():
        predicted = predicted_losses(utilities, sites, sets)
        rank: Any = spearmanr(predicted, losses)
        loss = float(losses[predicted.argmin()])
        found[name] = {"rank": float(rank.statistic), "loss": loss, "regret": loss - best}
    return {"sets": len(sets), "best": best, "utilities": found}


def tried_sets(plans: Sequence[Layers], layers: int, seed: int) -> list[Layers]:
    """Sets to try, each once, in ascending order.

    `plans`: layers off, ascending.
    """
    random = np.random.default_rng(seed)
    found = set(plans)
    for off in plans:
        on = [layer for layer in range(layers) if layer not in off]
        swaps = [(one, other) for one in off for other in on]
        for number in random.permutation(len(swaps))[:NEIGHBOURS]:
            one, other = swaps[number]
            found.add(tuple(sorted({*off, other} - {one})))
        for _ in range(RANDOM // len(plans)):
            found.add(tuple(sorted(random.permutation(layers)[: len(off)].tolist())))
    return sorted(found)


def predicted_losses(utilities: Utilities, sites: Sequence[Site], sets: Sequence[Layers]) -> Floats:
    """What utilities, and pairs where there are any, say that sets of layers lose."""
    alone = [float(utilities.of_site(site).sum()) for site in sites]

    def lost(off: Layers) -> float:
        pairs = combinations([sites[layer].name for layer in off], 2)
        return sum(alone[n] for n in off) + sum(utilities.pairs.get(p, 0.0) for p in pairs)

    return np.array([lost(off) for off in sets])

"""Removal chains held against trials: what narrowing a site alone, refitted, really costs.

A chain adds up errors at its own site, to second order. What becomes of them on the way to the
output is known by trying: a quarter of each site is removed, the rest refitted, and the divergence
of the model's output measured. All of the site's utilities are scaled to that.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from planner.ir.graph import Graph, Site
from planner.models.calibration.leave_one_out import measure
from planner.models.calibration.replay import Replay
from planner.models.calibration.samples import Sample, drawn, together
from planner.models.recovery.moments import Moments, faster_products, narrowable
from planner.models.recovery.refit import refitted, replaced
from planner.models.recovery.removal import Chain, chain_worth, with_layers
from planner.models.running.bindings import BoundLayer, BoundSite
from planner.models.running.masked import Gates, MaskedExecutor
from planner.models.running.program import Program
from planner.plan import Plan
from planner.solver.problem import Floats

# Samples that are tried, of each the last so many tokens, and how many run together.
TRIALS, JUDGED, _ROWS = 12, 96, 6
# Of a site's switches that are off.
_SHARE = 0.25
# Most that utilities are scaled by, either way: trials of a few samples have errors as well.
_MOST = 10.0


def tried_worth(
    model: Any,
    graph: Graph,
    layers: Sequence[BoundLayer],
    moments: Mapping[str, Moments],
    chain: Callable[[BoundSite], Chain],
    samples: Sequence[Sample],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Floats]:
    """Utilities by removal chains (`chain_worth`), each site's scaled to a trial.

    Args:
        model: dense, in evaluation mode; left as it was.
        graph: with switches assigned.
        layers: of the model, with the graph's switches.
        moments: by site.
        chain: of a site.
        samples: calibration samples; as many as `TRIALS` are drawn from them.
        progress: called with the number of sites done, and of all.

    Returns site name -> shape (switches,), in nats per answer token.
    """
    worth = chain_worth(graph, layers, chain)
    masked, sites = MaskedExecutor(model, graph), list(narrowable(layers))
    tried = [replace(s, answer=min(s.answer, JUDGED)) for s in drawn(samples, TRIALS)]
    with torch.no_grad(), faster_products(model):
        replays = [Replay(model, masked.layers, some, 1) for some in together(tried, _ROWS)]
    rows = [len(replay.sample.inputs["input_ids"]) for replay in replays]
    for done, own in enumerate(sites, 1):
        site, values = own.site, worth[own.site.name]
        off = np.argsort(values, kind="stable")[: max(1, round(_SHARE * site.switches))].tolist()
        plan = _without(graph, site, off)
        weights = refitted(Program.build([plan], graph, layers), moments, chain)
        # Autocast keeps rounded weights while it is on, so it is left after every trial.
        with (
            torch.no_grad(),
            replaced(model, weights),
            masked.using(Gates.of([plan], graph)),
            faster_products(model),
        ):
            found = [
                float(measure(replay.log_probabilities(site.layer), replay, "kl")[0])
                for replay in replays
            ]
        lost = np.average(found, weights=rows)
        predicted = max(float(values[off].sum()), np.finfo(float).tiny)
        worth[site.name] = values * np.clip(lost / predicted, 1 / _MOST, _MOST)
        progress(done, len(sites))
    return with_layers(graph, worth)


def _without(graph: Graph, site: Site, off: Sequence[int]) -> Plan:
    """The plan that switches off some of one site's switches, and nothing else."""
    kept = {site.layer: tuple(n for n in range(site.switches) if n not in off)}
    if site.kind == "heads":
        return Plan.of(graph, heads=kept)
    return Plan.of(graph, mlp=kept, mlp_switches={site.layer: site.switches})

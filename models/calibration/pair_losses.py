"""Pairs: what two things lose together besides what each loses alone.

With l(S) the divergence of the output when S is off, a pair is worth l(i, j) - l(i) - l(j). It is
measured where it matters: layers with layers, token keep counts with layers, and heads with the MLP
of one layer, whose absence together is that of the layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from planner.ir.graph import Graph, Site
from planner.loading import count_image_tokens
from planner.models.calibration.leave_one_out import Switch, losses_without, measure
from planner.models.calibration.measurement import settings_key
from planner.models.calibration.replay import Replay
from planner.models.calibration.samples import Sample
from planner.models.calibration.store import Store
from planner.models.calibration.token_worth import FRACTIONS
from planner.models.running.masked import MaskedExecutor
from planner.models.running.skipping import obeying
from planner.plan import Plan, TokenStage
from planner.progress import Progress
from planner.solver.problem import Floats


@dataclass(frozen=True, eq=False)
class PairLosses:
    """Means over samples, in nats per answer token."""

    # (site, site) -> what both lose together besides what each loses alone.
    sites: Mapping[tuple[str, str], float]
    fractions: Floats  # of image tokens kept, ascending; empty where there are none
    tokens: Floats  # shape (fractions, layers): what a layer that is off loses besides, at each


def measure_pairs(
    model: torch.nn.Module,
    graph: Graph,
    samples: Sequence[Sample],
    worth: Mapping[str, Floats],
    token_layer: int,
    selector: str = "",
    batch: int = 16,
    partial: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> PairLosses:
    """Measure pairs of layers, of tokens with layers, and of what is inside a layer.

    Equal arguments give equal numbers, whether in one run or continued from `partial`.

    Args:
        model: dense, in evaluation mode.
        graph: with switches assigned.
        worth: additive utilities by site, which pairs inside a layer correct.
        token_layer: before which image tokens are dropped.
        selector: what picks image tokens; "" where there are none.
        batch: pairs measured at once.
        partial: where to keep partial results; whoever keeps what comes out removes it.
    """
    sites = graph.sites_of("layer")
    pairs = list(combinations(range(len(sites)), 2))
    shapes: dict[str, tuple[int, ...]] = {
        "single": (len(samples), len(sites)),
        "double": (len(samples), len(pairs)),
    }
    if selector:
        shapes["tokens"] = (len(samples), len(FRACTIONS), graph.layers)
    key = settings_key(model, graph, samples, ("pairs", token_layer, selector, batch))
    store = Store(partial, key, shapes)
    masked = MaskedExecutor(model, graph)
    try:
        for index, sample in enumerate(samples):
            arrays = {name: array[index] for name, array in store.arrays.items()}
            for _ in _measure(masked, sample, sites, pairs, arrays, (token_layer, selector), batch):
                store.save()
                progress(store.done, store.total)
    finally:
        store.save(now=True)
    means = {name: array.mean(0) for name, array in store.arrays.items()}
    single, double = means["single"].tolist(), means["double"].tolist()
    found = {
        (sites[a].name, sites[b].name): both - single[a] - single[b]
        for (a, b), both in zip(pairs, double, strict=True)
    }
    for site, loss in zip(sites, single, strict=True):
        inside = [s.name for s in graph.sites_at(site.layer) if s.kind != "layer"]
        if len(inside) == 2:
            additive = sum(float(worth[name].sum()) for name in inside)
            found[inside[0], inside[1]] = loss - additive
    none = np.zeros((0, graph.layers))
    return PairLosses(found, np.array(FRACTIONS if selector else ()), means.get("tokens", none))


def _measure(
    masked: MaskedExecutor,
    sample: Sample,
    sites: Sequence[Site],
    pairs: Sequence[tuple[int, int]],
    arrays: Mapping[str, Floats],
    stage: tuple[int, str],
    batch: int,
) -> Iterator[None]:
    """Fill in what is missing of one sample, part by part."""
    replay: Replay | None = None
    alone = [(n,) for n in range(len(sites))]
    for found, sets in ((arrays["single"], alone), (arrays["double"], pairs)):
        for start in range(0, len(sets), batch):
            part = slice(start, start + batch)
            if np.isnan(found[part]).any():
                replay = replay or Replay(masked.model, masked.layers, sample, batch)
                found[part] = layer_losses(masked, replay, sites, sets[part])
                yield
    if "tokens" in arrays and np.isnan(arrays["tokens"]).any():
        arrays["tokens"][...] = _with_tokens(masked, sample, sites, arrays["single"], stage)
        yield


def layer_losses(
    executor: MaskedExecutor,
    replay: Replay,
    sites: Sequence[Site],
    sets: Sequence[Sequence[int]],
) -> Floats:
    """KL divergence of one sample with sets of layers off: numbers of `sites`, none empty."""
    off = [[Switch(sites[number], 0) for number in some] for some in sets]
    return losses_without(executor, replay, off, "kl")


@torch.no_grad()
def _with_tokens(
    executor: MaskedExecutor,
    sample: Sample,
    sites: Sequence[Site],
    alone: Floats,
    stage: tuple[int, str],
) -> Floats:
    """What each layer loses besides when tokens are dropped as well; shape (fractions, layers)."""
    graph = executor.graph
    of = count_image_tokens(executor.model, dict(sample.inputs))
    replay = Replay(executor.model, executor.layers, sample, len(FRACTIONS))

    def losses(off: tuple[int, ...]) -> Floats:
        stages = [TokenStage(stage[0], max(1, int(of * kept)), of, stage[1]) for kept in FRACTIONS]
        plans = [Plan.of(graph, layers_off=off, tokens=(dropped,)) for dropped in stages]
        with obeying(executor.model, graph, plans):
            found = measure(replay.log_probabilities(0), replay, "kl")
        return found.double().cpu().numpy()

    result = np.zeros((len(FRACTIONS), graph.layers))
    dropped = losses(())
    for site, loss in zip(sites, alone, strict=True):
        # A layer that scores the tokens cannot be off while they are picked.
        if site.layer != stage[0] - 1:
            result[:, site.layer] = losses((site.layer,)) - dropped - loss
    return result

"""Least-squares recovery: what is kept of a site learns to say what was removed.

With C = E[x x^T] + lambda I over the inputs of a sink, W its weight and K the features that stay,
the weight W'_K = W C[:, K] C[K, K]^-1 on those alone changes the output least over the calibration
samples, and, by lambda, the weight itself. One closed form per site, no training; known from
SlimGPT (arXiv 2412.18110) and ZipLM (arXiv 2302.04089).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from planner.ir.intervals import Intervals
from planner.models.recovery.arranging import can_move, lane_features, moved, stored
from planner.models.recovery.moments import Moments
from planner.models.recovery.removal import Chain
from planner.models.running.bindings import BoundSite
from planner.models.running.program import Program


def refit(weight: Tensor, inputs: Tensor, kept: Tensor) -> Tensor:
    """The weight on the kept features that best replaces the whole one.

    Args:
        weight: shape (outputs, features).
        inputs: second moment of the features with its ridge, shape (features, features).
        kept: feature numbers, shape (kept,).

    Returns shape (outputs, kept), float64.
    """
    rows = inputs[kept]
    solution: Tensor = torch.linalg.solve(rows[:, kept], rows @ weight.double().T)
    return solution.T


@torch.no_grad()
def refitted(
    program: Program, moments: Mapping[str, Moments], chain: Callable[[BoundSite], Chain]
) -> dict[str, Tensor]:
    """Weights for a plan.

    Args:
        program: of one plan.
        moments: by site, of the dense model.
        chain: of a site whose neurons can move; it says which of them stay.

    Returns:
        Parameter name -> whole weight as its module stores it. Nothing reads what the plan removes.
    """
    found: dict[str, Tensor] = {}
    for layer in program.layers:
        group = layer.groups[0]
        for site, lanes in ((layer.layer.heads, group.heads), (layer.layer.mlp, group.mlp)):
            if site is not None and lanes and group.on:
                found |= _site_weights(site, lanes, moments[site.site.name].damped(), chain)
    return found


def _site_weights(
    site: BoundSite, lanes: Intervals, inputs: Tensor, chain: Callable[[BoundSite], Chain]
) -> dict[str, Tensor]:
    """Parameters of one site, of which some lanes are kept."""
    sink, count = site.sink, site.site.lanes
    places = torch.cat([torch.arange(a, b) for a, b in lanes])
    is_kept = torch.zeros(count, dtype=torch.bool)
    is_kept[places] = True
    stays = is_kept.clone()
    if can_move(site):
        stays[:] = False
        stays[chain(site).order[count - len(places) :]] = True
    is_read = torch.ones(sink.features, dtype=torch.bool)
    is_read[lane_features(sink, count)[~stays].flatten()] = False
    weight = sink.weight.detach().clone()
    better = refit(weight, inputs, is_read.nonzero()[:, 0].to(weight.device))
    weight[:, is_read] = better.to(weight.dtype)
    if not can_move(site):
        return {f"{sink.path}.weight": stored(sink, weight)}
    neurons = torch.empty(count, dtype=torch.long)
    neurons[is_kept], neurons[~is_kept] = stays.nonzero()[:, 0], (~stays).nonzero()[:, 0]
    return moved(site, neurons, weight)


@contextmanager
def replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """Other values of some parameters, for a block."""
    before = exchange(model, weights)
    try:
        yield
    finally:
        exchange(model, before)


def storable(weights: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights rounded to what a checkpoint of some precision holds; None leaves them."""
    return {name: w if dtype is None else w.to(dtype).to(w.dtype) for name, w in weights.items()}


@torch.no_grad()
def exchange(model: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Write values into parameters, and hand back what was there."""
    before = {}
    for name, value in weights.items():
        parameter = model.get_parameter(name)
        before[name] = parameter.detach().clone()
        parameter.copy_(value)
    return before

"""Neurons that change places: which of an MLP's lie in the groups that a plan keeps.

An MLP computes the same whatever the order of its neurons, so a plan that keeps two thirds of its
groups can keep any two thirds of its neurons: those worth most are moved there.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from planner.models.running.bindings import BoundLinear, BoundSite


def lane_features(linear: BoundLinear, lanes: int) -> Tensor:
    """Which features belong to each lane, shape (lanes, features of a lane)."""
    parts = [
        block.offset + block.stride * torch.arange(lanes)[:, None] + torch.arange(block.width)
        for block in linear.binding.blocks
    ]
    return torch.cat(parts, 1)


def switch_features(site: BoundSite) -> list[Tensor]:
    """The features of the sink that belong to each switch."""
    lanes = lane_features(site.sink, site.site.lanes)
    return [lanes[first:last].flatten() for first, last in pairwise(site.site.bounds)]


def can_move(site: BoundSite) -> bool:
    """Whether neurons are known by their weights alone, so that they can change places."""
    own = {id(linear.parameter) for linear in site.linears}
    own |= {id(linear.bias) for linear in site.linears}
    others = [*site.module.parameters(), *site.module.buffers()]
    return site.site.kind == "mlp" and not any(
        site.site.lanes in tensor.shape for tensor in others if id(tensor) not in own
    )


def moved(site: BoundSite, places: Tensor, sink: Tensor) -> dict[str, Tensor]:
    """Parameters of a site with its neurons in other places.

    Args:
        site: an MLP that `can_move`.
        places: shape (lanes,): the neuron that comes to each place.
        sink: a weight for the site's sink, neurons where they were.

    Returns parameter name -> value, as modules store them.
    """
    found = {}
    for linear in site.linears:
        features = lane_features(linear, site.site.lanes)
        source = torch.arange(linear.features)
        source[features] = features[places]
        source = source.to(linear.weight.device)
        weight = sink if linear is site.sink else linear.weight.detach()
        found[f"{linear.path}.weight"] = stored(linear, weight.index_select(linear.dim, source))
        if linear.bias is not None and linear.axis == "out":
            found[f"{linear.path}.bias"] = linear.bias.detach()[source]
    return found


def stored(linear: BoundLinear, weight: Tensor) -> Tensor:
    """A weight of shape (out features, in features) as the module stores it."""
    return weight.t() if isinstance(linear.module, Conv1D) else weight

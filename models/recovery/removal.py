"""Worth along the removal chain: what each switch is worth when the rest makes up for it.

Site by site, groups of the sink's inputs are removed one after the other, each time those whose
loss the remaining features can best make up for, by least squares. With S removed, what cannot be
made up for has the covariance A = ((C + lambda I)^-1 [S, S])^-1, so the error at the output has
W_S A W_S^T, and costs half its product with the Fisher information (`Moments`). That is the optimal
brain surgeon (Hassibi and Stork 1993) on groups of inputs, as in ZipLM (arXiv 2302.04089).

Sums along the chain are the site's cost at each count, so utilities stay additive. What a switch
costs when removed alone is of no use here: switches stand in for one another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import isotonic_regression
from torch import Tensor

from planner.ir.graph import Graph
from planner.models.recovery.arranging import can_move, lane_features, switch_features
from planner.models.recovery.moments import Moments, narrowable
from planner.models.running.bindings import BoundLayer, BoundSite
from planner.solver.problem import Floats

# Of a chain of single neurons, so many steps are taken.
_STEPS = 48


@dataclass(frozen=True, eq=False)
class Chain:
    """In which order a site loses its groups, and what each costs."""

    order: Tensor  # shape (groups,): the first to go first
    costs: Floats  # shape (groups,): of each step, in nats per answer token


def removal_chain(
    weight: Tensor, moments: Moments, groups: Sequence[Tensor], at_once: int = 1
) -> Chain:
    """In which order to remove groups of features, and what each step costs.

    Args:
        weight: shape (outputs, features).
        moments: of the sink.
        groups: feature numbers of each group, disjoint.
        at_once: groups removed in one step; its cost is shared among them.
    """
    inverse = torch.linalg.inv(moments.damped())
    # With F = L L^T and rest = L^T W, costs are sums of squares.
    values, vectors = torch.linalg.eigh(moments.gradients.double())
    rest = (vectors * values.clamp(min=0).sqrt()).T @ weight.double()
    left = torch.arange(len(groups))
    order, costs = [], []
    while len(left):
        errors = _errors(rest, inverse, [groups[number] for number in left.tolist()])
        rank = torch.argsort(errors, stable=True)
        gone, left = left[rank[:at_once]], left[rank[at_once:].sort().values]
        removed = torch.cat([groups[number] for number in gone.tolist()])
        part, block = rest[:, removed], inverse[removed][:, removed]
        cost = 0.5 * float((part * torch.linalg.solve(block, part.T).T).sum())
        gain = torch.linalg.solve(block, inverse[removed])
        rest = rest - part @ gain
        inverse = inverse - inverse[:, removed] @ gain
        order.append(gone)
        costs += [max(cost, 0.0) / len(gone)] * len(gone)
    return Chain(torch.cat(order), np.array(costs))


def _errors(rest: Tensor, inverse: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """What removing each group by itself costs; shape (groups,)."""
    found = torch.empty(len(groups), dtype=rest.dtype)
    for width in {len(group) for group in groups}:
        which = [number for number, group in enumerate(groups) if len(group) == width]
        index = torch.stack([groups[number] for number in which])
        part = rest.T[index]
        blocks = inverse[index[:, :, None], index[:, None, :]]
        found[which] = 0.5 * (part * torch.linalg.solve(blocks, part)).sum((1, 2)).cpu()
    return found


def chain_of(site: BoundSite, moments: Moments) -> Chain:
    """The removal chain of a site: of single neurons where they can move, else of its switches."""
    weight = site.sink.weight.detach()
    if not can_move(site):
        return removal_chain(weight, moments, switch_features(site))
    neurons = lane_features(site.sink, site.site.lanes)
    return removal_chain(weight, moments, list(neurons), max(1, len(neurons) // _STEPS))


def chain_worth(
    graph: Graph, layers: Sequence[BoundLayer], chain: Callable[[BoundSite], Chain]
) -> dict[str, Floats]:
    """Utilities of every switch of the graph, by the removal chain of its site.

    Where neurons can move, refitting puts those that are worth most into the switches that a plan
    keeps (`planner.models.recovery.refit`): then it is the count that costs, and the last switch is
    the first to go. A layer is worth what all its switches are.

    Args:
        graph: with switches assigned.
        layers: of the model, with the graph's switches.
        chain: of a site.

    Returns site name -> shape (switches,), in nats per answer token.
    """
    worth: dict[str, Floats] = {}
    for site in narrowable(layers):
        removed, switches = chain(site), site.site.switches
        costs, order = removed.costs, removed.order.numpy()
        if can_move(site):
            sizes = np.diff(site.site.bounds)[::-1]
            costs = np.add.reduceat(costs, np.cumsum(sizes) - sizes)
            order = np.arange(switches)[::-1]
        values = np.empty(switches)
        # The solver keeps the most useful switches of a site, those with lower numbers first.
        values[order] = isotonic_regression(costs).x + 1e-12 * np.arange(len(costs))
        worth[site.site.name] = values
    return with_layers(graph, worth)


def with_layers(graph: Graph, worth: dict[str, Floats]) -> dict[str, Floats]:
    """Utilities of heads and MLPs with those of layers: what all switches inside are worth."""
    for layer in graph.sites_of("layer"):
        inside = [s.name for s in graph.sites_at(layer.layer) if s.name in worth and s != layer]
        worth[layer.name] = np.array([sum(worth[name].sum() for name in inside)])
    return worth

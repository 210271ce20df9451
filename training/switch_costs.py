"""What switches cost, given which are on: counted, added up, or read from a Problem's tables.

Estimators ask one question at every draw: what would each switch add now? So they keep to limits
whatever the structure of the costs. All numbers are integers, as in `planner.solver.problem`, and
sums of them are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from planner.ir.errors import InputError
from planner.models.scheduling import CostSwitches, Layout, UnifiedSwitches
from planner.solver.problem import Problem

#: Cost of a switch that cannot be taken yet: more than any limit.
NEVER = torch.iinfo(torch.int64).max


class Costs(ABC):
    """What each switch would add to the cost now, given those that are on."""

    @abstractmethod
    def of_next(self, taken: Tensor) -> Tensor:
        """Cost of adding each switch, (batch, switches), int64; of those taken, anything."""

    @staticmethod
    @abstractmethod
    def together(each: Sequence[Any]) -> Costs:
        """The costs of a batch, from those of its samples, which are of one kind."""

    def ranked(self, scores: Tensor) -> Tensor:
        """Indices of switches in the order in which they are taken, best first, (batch, switches).

        Of equal scores the lower index is first.
        """
        return scores.argsort(dim=-1, descending=True, stable=True)


@dataclass(frozen=True, eq=False)
class AdditiveCosts(Costs):
    """A switch costs the same whatever else is on."""

    prices: Tensor  # shape (batch or 1, switches), int64, not negative

    def __post_init__(self) -> None:
        if self.prices.dtype != torch.int64 or self.prices.ndim != 2 or (self.prices < 0).any():
            raise InputError("costs of switches are int64, (batch or 1, switches), not negative")

    @staticmethod
    def equal(switches: int) -> AdditiveCosts:
        """Every switch costs 1, so that a limit is a number of switches."""
        return AdditiveCosts(torch.ones(1, switches, dtype=torch.int64))

    @override
    def of_next(self, taken: Tensor) -> Tensor:
        return self.prices.to(taken.device).expand(taken.shape)

    @staticmethod
    @override
    def together(each: Sequence[AdditiveCosts]) -> AdditiveCosts:
        return AdditiveCosts(torch.cat([costs.prices for costs in each]))


@dataclass(frozen=True, eq=False)
class SiteCosts(Costs):
    """Costs of the switches of a `planner.solver.problem.Problem` with one metric.

    Switches are in the order of `planner.solver.problem.Flags`. A layer's own switch costs what the
    layer needs with its sites at their minimum. The switches of its sites can be taken only after
    it, and each costs the next step of its site's table.
    """

    # Shape (switches,): the own switch of the layer that a switch is in, -1 where the layer is
    # always on, and for own switches.
    needs: Tensor
    # Shape (switches,): the site of a switch, counted in model order; a layer's own switch is a
    # group by itself.
    group: Tensor
    steps: Tensor  # shape (batch or 1, groups, most switches + 1): cost from n to n + 1 switches

    @staticmethod
    def of(problem: Problem, token_options: Sequence[int] = (0,)) -> SiteCosts:
        """The costs of a Problem's switches, under every sample's token option, or one for all.

        Raises InputError: the problem has several metrics, or none.
        """
        if len(problem.metrics) != 1:
            given = ", ".join(problem.metrics) or "none"
            raise InputError(f"switches are taken under one metric, not under {given}")
        options = np.array(token_options, dtype=np.int64)
        needs: list[int] = []
        group: list[int] = []
        tables: list[np.ndarray] = []
        for layer in problem.layers:
            own = -1
            if layer.optional:
                own = len(needs)
                needs.append(-1)
                group.append(len(tables))
                least = sum(site.costs[options, 0, site.minimum] for site in layer.sites)
                tables.append((layer.costs[options, 0] + least)[:, None])
            for site in layer.sites:
                needs += [own] * site.switches
                group += [len(tables)] * site.switches
                # The first ones, up to the minimum, are paid for by the layer.
                table = site.costs[options, 0]
                tables.append(np.diff(np.maximum(table, table[:, [site.minimum]])))
        most = max((table.shape[1] for table in tables), default=0)
        steps = np.zeros((len(options), len(tables), most + 1), dtype=np.int64)
        for number, table in enumerate(tables):
            steps[:, number, : table.shape[1]] = table
        index = torch.tensor([needs, group], dtype=torch.int64)
        return SiteCosts(index[0], index[1], torch.from_numpy(steps))

    @staticmethod
    @override
    def together(each: Sequence[SiteCosts]) -> SiteCosts:
        return replace(each[0], steps=torch.cat([costs.steps for costs in each]))

    @override
    def of_next(self, taken: Tensor) -> Tensor:
        """`NEVER` for switches of layers that are off."""
        group, needs = self.group.to(taken.device), self.needs.to(taken.device)
        steps = self.steps.to(taken.device).expand(len(taken), -1, -1)
        counts = torch.zeros_like(steps[:, :, 0])
        counts = counts.scatter_add(1, group.expand_as(taken), taken.long())
        locked = (needs >= 0) & ~taken[:, needs.clamp(min=0)]
        return steps.gather(2, counts[..., None])[:, group, 0].masked_fill(locked, NEVER)

    @override
    def ranked(self, scores: Tensor) -> Tensor:
        """A switch counts no more than the layer it is in.

        The order of `planner.solver.take_while_fits`: of equal scores first the layer's own, then
        site by site; in a site the best first, though they count no more than their layer.
        """
        needs, group = self.needs.to(scores.device), self.group.to(scores.device)
        most = scores[:, needs.clamp(min=0)].masked_fill(needs < 0, torch.inf)
        capped = torch.minimum(scores, most)
        # Stable sorts, the least significant key first.
        order = super().ranked(scores)
        order = order.gather(1, group[order].argsort(dim=-1, stable=True))
        return order.gather(1, super().ranked(capped.gather(1, order)))


def costs_of(layout: Layout, options: Tensor | None = None) -> Costs:
    """What a layout's switches cost, in the measure of its limits.

    Where a layout has token counts, they are of each sample's, `options` (batch,) by index; None
    for all tokens.

    Costs that add up are given as such, for the estimators that need it: those of switches that
    wait for no layer, and of which one costs as much as the next.
    """
    if isinstance(layout, UnifiedSwitches):
        chosen = [len(layout.counts) - 1] if options is None else options.tolist()
        known = {option: costs_of(layout.at(option)) for option in set(chosen)}
        each = [known[option] for option in chosen]
        return type(each[0]).together(each)
    if not isinstance(layout, CostSwitches):
        return AdditiveCosts.equal(layout.size)
    costs = SiteCosts.of(layout.problem)
    even = all((np.ptp(np.diff(site.costs[0, 0])) == 0) for site in layout.problem.sites)
    if even and (costs.needs < 0).all():
        return AdditiveCosts(costs.of_next(torch.zeros(1, layout.size, dtype=torch.bool)))
    return costs

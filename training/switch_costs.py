"""What switches cost, given which are on: counted, added up, or read from a Problem's tables.

Estimators ask one question at every draw: what would each switch add now? So they keep to limits
whatever the structure of the costs. All numbers are integers, as in `planner.solver.problem`, and
sums of them are exact.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from planner.ir.errors import InputError
from planner.models.scheduling import CostSwitches, Layout
from planner.solver.problem import Problem

#: Cost of a switch that cannot be taken yet: more than any limit.
NEVER = torch.iinfo(torch.int64).max


class Costs(ABC):
    """What each switch would add to the cost now, given those that are on."""

    @abstractmethod
    def of_next(self, taken: Tensor) -> Tensor:
        """Cost of adding each switch.

        Args:
            taken: shape (batch, switches), bool.

        Returns:
            Shape (batch, switches), int64; for switches that are taken already, anything.
        """

    def ranked(self, scores: Tensor) -> Tensor:
        """Switches in the order in which they are taken, best first; ties to the lower index.

        Args:
            scores: shape (batch, switches).

        Returns:
            Shape (batch, switches), int64: indices of switches.
        """
        return scores.argsort(dim=-1, descending=True, stable=True)


@dataclass(frozen=True, eq=False)
class AdditiveCosts(Costs):
    """A switch costs the same whatever else is on.

    Attributes:
        prices: shape (batch or 1, switches), int64, not negative.
    """

    prices: Tensor

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


@dataclass(frozen=True, eq=False)
class SiteCosts(Costs):
    """Costs of the switches of a `planner.solver.problem.Problem` with one metric.

    Switches are in the order of `planner.solver.problem.Flags`. A layer's own switch costs what the
    layer needs with its sites at their minimum. The switches of its sites can be taken only after
    it, and each costs the next step of its site's table.

    Attributes:
        needs: shape (switches,): the own switch of the layer that a switch is in, -1 where the
            layer is always on, and for own switches.
        site: shape (switches,): the site of a switch; the number of sites for own switches.
        entry: shape (batch or 1, switches): cost of own switches.
        steps: shape (batch or 1, sites + 1, most switches + 1): cost from n to n + 1 switches.
    """

    needs: Tensor
    site: Tensor
    entry: Tensor
    steps: Tensor

    @staticmethod
    def of(problem: Problem, token_options: Sequence[int] = (0,)) -> SiteCosts:
        """The costs of a Problem's switches.

        Args:
            problem: with one metric.
            token_options: the option of every sample, or one for all of them.

        Raises:
            InputError: the problem has several metrics, or none.
        """
        if len(problem.metrics) != 1:
            given = ", ".join(problem.metrics) or "none"
            raise InputError(f"switches are taken under one metric, not under {given}")
        options = np.array(token_options, dtype=np.int64)
        most = max((site.switches for site in problem.sites), default=0)
        steps = np.zeros((len(options), len(problem.sites) + 1, most + 1), dtype=np.int64)
        needs: list[int] = []
        numbers: list[int] = []
        entry: list[np.ndarray] = []
        number = 0
        for layer in problem.layers:
            own = len(needs) if layer.optional else -1
            if layer.optional:
                least = sum(s.costs[options, 0, s.minimum] for s in layer.sites)
                entry.append(layer.costs[options, 0] + least)
                needs.append(-1)
                numbers.append(len(problem.sites))
            for site in layer.sites:
                # The first ones, up to the minimum, are paid for by the layer.
                table = site.costs[options, 0]
                table = np.maximum(table, table[:, [site.minimum]])
                steps[:, number, : site.switches] = np.diff(table)
                entry += [np.zeros_like(options)] * site.switches
                needs += [own] * site.switches
                numbers += [number] * site.switches
                number += 1
        return SiteCosts(
            torch.tensor(needs, dtype=torch.int64),
            torch.tensor(numbers, dtype=torch.int64),
            torch.from_numpy(np.stack(entry, 1) if entry else np.zeros((len(options), 0), int)),
            torch.from_numpy(steps),
        )

    @override
    def of_next(self, taken: Tensor) -> Tensor:
        """`NEVER` for switches of layers that are off."""
        device, batch = taken.device, len(taken)
        site, needs = self.site.to(device), self.needs.to(device)
        steps = self.steps.to(device).expand(batch, -1, -1)
        counts = torch.zeros(steps.shape[:2], dtype=torch.int64, device=device)
        counts = counts.scatter_add(1, site.expand(batch, -1), taken.long())
        # The last site stands for layers' own switches, of which there may be more than steps.
        counts[:, -1] = 0
        step = steps.gather(2, counts[..., None])[..., 0][:, site]
        locked = (needs >= 0) & ~taken[:, needs.clamp(min=0)]
        return (step + self.entry.to(device)).masked_fill(locked, NEVER)

    @override
    def ranked(self, scores: Tensor) -> Tensor:
        """A switch counts no more than the layer it is in.

        The order of `planner.solver.take_while_fits`: of equal scores first the layer's own, then
        site by site; in a site the best first, though they count no more than their layer.
        """
        needs, group = self.needs.to(scores.device), self._group.to(scores.device)
        most = scores[:, needs.clamp(min=0)].masked_fill(needs < 0, torch.inf)
        capped = torch.minimum(scores, most)
        # Stable sorts, the least significant key first.
        order = super().ranked(scores)
        order = order.gather(1, group[order].argsort(dim=-1, stable=True))
        return order.gather(1, super().ranked(capped.gather(1, order)))

    @property
    def _group(self) -> Tensor:
        """Number of a switch's site, or of its layer for an own switch, in model order."""
        own = self.site == self.steps.shape[1] - 1
        fresh = own | torch.cat([own.new_ones(1), self.site[1:] != self.site[:-1]])[: len(own)]
        return fresh.long().cumsum(0)


def costs_of(layout: Layout) -> Costs:
    """What a layout's switches cost, in the measure of its limits.

    Costs that add up are given as such, for the estimators that need it: those of switches that
    wait for no layer, and of which one costs as much as the next.
    """
    if not isinstance(layout, CostSwitches):
        return AdditiveCosts.equal(layout.size)
    costs = SiteCosts.of(layout.problem)
    even = all((np.ptp(np.diff(site.costs[0, 0])) == 0) for site in layout.problem.sites)
    if even and (costs.needs < 0).all():
        return AdditiveCosts(costs.of_next(torch.zeros(1, layout.size, dtype=torch.bool)))
    return costs

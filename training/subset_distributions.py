"""Exact distributions over subsets that fill a limit, by a dynamic programme over cost.

SIMPLE (Ahmed et al., arXiv 2210.01941) computes partition function, samples and marginals of the
k-subsets. Here costs may differ, and the subsets are those that fit and leave no room for another
item; with equal costs these are the k-subsets.

Sort items by cost, and let m be the first item that a subset lacks. All items before m are in it,
and what it leaves of the limit is less than the cost of m, the cheapest item that it lacks. So the
subsets fall into classes by m, and a class is a sum over the total cost of its items after m.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

# Stands for log 0: differentiable without NaN, and exp of it is 0.
_LOG_ZERO = -1e300


@dataclass(frozen=True, eq=False)
class Subsets:
    """P(subset) proportional to the product of exp(weight) over its items; in float64."""

    weights: Tensor  # shape (batch, items), float64, items by ascending cost
    costs: Tensor  # shape (batch, items), int64, ascending; more than the limit counts as limit + 1
    limits: Tensor  # shape (batch,), int64
    order: Tensor  # shape (batch, items): which item stands at each place
    exact: bool  # whether all costs are as given, and not rounded up to coarser units

    @staticmethod
    def of(weights: Tensor, costs: Tensor, limits: Tensor, columns: int) -> Subsets:
        """The subsets of items that fill their limits.

        Args:
            weights: shape (batch, items), log-weights; may have a gradient.
            costs: shape (batch, items), int64, not negative.
            limits: shape (batch,), int64, not negative.
            columns: count each limit in at most so many steps. A row's costs are divided by their
                greatest common divisor, or, where that is not enough, by a larger unit and rounded
                up; so what a row's distribution is does not depend on its batch.
        """
        limits = limits.to(weights.device)
        costs = torch.minimum(costs, limits[:, None] + 1)
        fitting = torch.where(costs > limits[:, None], 0, costs)
        common = np.gcd.reduce(fitting.cpu().numpy(), axis=1, initial=0)
        unit = torch.from_numpy(common).to(limits).clamp(min=1)
        coarse = limits // unit > columns
        unit = torch.where(coarse, -(-limits // columns), unit)
        limits = limits // unit
        costs = torch.minimum(-(-costs // unit[:, None]), limits[:, None] + 1)
        costs, order = costs.sort(dim=-1, stable=True)
        return Subsets(weights.double().gather(1, order), costs, limits, order, not coarse.any())

    @cached_property
    def _totals(self) -> list[Tensor]:
        """By place: log-weights of subsets of the items from there on, by cost up to the limit."""
        batch, items = self.weights.shape
        width = int(self.limits.max()) + 1
        column = torch.arange(width, device=self.weights.device)
        row = self.weights.new_full((batch, width), _LOG_ZERO)
        row[:, 0] = 0
        rows = [row]
        for place in reversed(range(items)):
            before = column - self.costs[:, place, None]
            moved = row.gather(1, before.clamp(min=0)) + self.weights[:, place, None]
            moved = moved.masked_fill(before < 0, _LOG_ZERO)
            # Not logaddexp, whose second derivative overflows where one side is log 0.
            row = torch.stack([row, moved]).logsumexp(0)
            rows.append(row)
        return rows[::-1]

    @cached_property
    def _classes(self) -> tuple[Tensor, Tensor]:
        """Log-weights of classes, (batch, items + 1), and costs of the items before the missing.

        The last class is the subset that lacks none.
        """
        items = self.weights.shape[1]
        zero = self.weights.new_zeros(len(self.weights), 1)
        weight = torch.cat([zero, self.weights.cumsum(-1)], 1)
        cost = torch.cat([zero.long(), self.costs.cumsum(-1)], 1)
        classes = [
            self._filling(self._totals[place + 1], self.costs[:, place], cost[:, place]).logsumexp(
                -1
            )
            for place in range(items)
        ]
        whole = zero[:, 0].masked_fill(cost[:, -1] > self.limits, _LOG_ZERO)
        return weight + torch.stack([*classes, whole], 1), cost

    def _filling(self, totals: Tensor, lacking: Tensor, spent: Tensor) -> Tensor:
        """Of log-weights by total cost, (batch, columns), those that fill up what is left.

        Without an item of cost `lacking` (batch,), and `spent` (batch,) already; log 0 elsewhere.
        """
        column = torch.arange(totals.shape[1], device=totals.device)
        left = (self.limits - spent)[:, None]
        fills = (column <= left) & (column > left - lacking[:, None])
        return totals.masked_fill(~fills, _LOG_ZERO)

    @cached_property
    def log_partition(self) -> Tensor:
        """Log of the summed weight of all subsets; shape (batch,)."""
        return self._classes[0].logsumexp(-1)

    def log_probability(self, taken: Tensor) -> Tensor:
        """Of subsets that fill their limits, (batch, items) in the order given to `of`."""
        here = taken.gather(1, self.order)
        return torch.where(here, self.weights, 0).sum(-1) - self.log_partition

    def marginals(self) -> Tensor:
        """Probability that each item is in the subset, differentiable; shape (batch, items)."""
        total = self.log_partition.sum()
        (found,) = torch.autograd.grad(total, self.weights, create_graph=True)
        return torch.zeros_like(found).scatter(1, self.order, found)

    def sample(self, uniform: Tensor) -> Tensor:
        """One subset for each row; shape (batch, items), bool, in the order given to `of`.

        `uniform`: shape (batch, items + 2), in [0, 1), what chance decides.
        """
        # Outside `no_grad`: what is remembered here, marginals are differentiated through.
        classes, spent = self._classes
        with torch.no_grad():
            taken = self._sample(classes, spent, uniform.to(self.weights))
        return torch.zeros_like(taken).scatter(1, self.order, taken)

    def _sample(self, classes: Tensor, spent: Tensor, uniform: Tensor) -> Tensor:
        """First the class, then the total after the missing item, then what makes it."""
        items = self.weights.shape[1]
        missing = _categorical(classes, uniform[:, -1])
        taken = torch.arange(items, device=classes.device) < missing[:, None]
        # Of a row that lacks none, nothing comes after any item, and the total is not used.
        first = missing.clamp(max=items - 1)
        after = torch.stack([self._totals[p + 1][row] for row, p in enumerate(first.tolist())])
        lacking, before = (each.gather(1, first[:, None])[:, 0] for each in (self.costs, spent))
        total = _categorical(self._filling(after, lacking, before), uniform[:, -2])
        left = torch.zeros_like(missing)
        for place in range(items):
            after = self._totals[place + 1]
            rest = left - self.costs[:, place]
            with_it = self.weights[:, place] + _reached(after, rest)
            chance = torch.sigmoid(with_it - _reached(after, left))
            drawn = (uniform[:, place] < chance) & (missing < place) & (rest >= 0)
            taken[:, place] |= drawn
            left = torch.where(missing == place, total, torch.where(drawn, rest, left))
        return taken


def _reached(totals: Tensor, cost: Tensor) -> Tensor:
    """Log-weight (batch,) of each row at its cost, log 0 where that is negative."""
    found = totals.gather(1, cost.clamp(min=0)[:, None])[:, 0]
    return found.masked_fill(cost < 0, _LOG_ZERO)


def _categorical(weights: Tensor, uniform: Tensor) -> Tensor:
    """One index for each row of log-weights, (batch, n), by inversion; `uniform` is (batch,)."""
    up_to = weights.softmax(-1).cumsum(-1)
    whole = up_to[:, -1:].contiguous()
    drawn = torch.searchsorted(up_to, uniform[:, None] * whole, right=True)
    # The product may be rounded up to the whole, beyond which there is nothing.
    return torch.minimum(drawn, torch.searchsorted(up_to, whole))[:, 0]

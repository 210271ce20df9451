"""Integer columns: the steps that a core may take, with needless choices taken out.

- Twins. Of k layers, or k sites, with equal tables it matters only how many take a step, so one
  column with values 0 ... k stands for that step of all of them.
- Loose steps. Where no step of a site costs less than the one before it or is worth more, any set
  of its steps can be exchanged for as many first ones. Wherever in the model such steps are, a step
  that is worth at least as much as another, and costs no more, is taken before it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby, pairwise

import numpy as np

from planner.solver.problem import Costs


@dataclass(frozen=True, order=True)
class Step:
    """What one step adds: integer units of utility, and cost per metric."""

    utility: int
    cost: tuple[int, ...]


@dataclass(frozen=True)
class Columns:
    """Columns in the making."""

    # Of each column, what one unit adds.
    steps: list[Step] = field(default_factory=list)
    # Of each column, who can take the step; value v means that the first v do.
    members: list[list[int]] = field(default_factory=list)
    # Pairs (a, b): the share of a's members that take its step may not exceed b's.
    order: list[tuple[int, int]] = field(default_factory=list)

    def add(self, step: Step, members: list[int], after: int | None = None) -> int:
        """One column, which may need another; returns its index."""
        self.steps.append(step)
        self.members.append(members)
        column = len(self.steps) - 1
        if after is not None:
            self.order.append((column, after))
        return column

    def add_chain(
        self, steps: tuple[Step, ...], members: list[int], after: int | None = None
    ) -> None:
        """Steps that each need the one before."""
        for step in steps:
            after = self.add(step, members, after)

    def add_loose(self, steps: list[tuple[Step, int]]) -> None:
        """Loose steps, each with its member, of any number of sites."""
        ranked = sorted(steps, key=lambda item: (-item[0].utility, item[0].cost, item[1]))
        columns = [
            self.add(step, [member for _, member in same])
            for step, same in groupby(ranked, key=lambda item: item[0])
        ]
        if columns:
            cost = np.array([self.steps[column].cost for column in columns], dtype=np.int64).T
            self.order.extend((columns[a], columns[b]) for a, b in _precedence(cost))


def are_loose(steps: tuple[Step, ...]) -> bool:
    """Whether a site's steps never fall in any cost and never rise in utility."""
    return all(
        after.utility <= before.utility and all(a >= b for a, b in zip(after.cost, before.cost))
        for before, after in pairwise(steps)
    )


def _precedence(cost: Costs) -> list[tuple[int, int]]:
    """Pairs (a, b) of columns in order of utility: b comes first, for it costs no more.

    Pairs that follow from others are left out. `cost`: shape (metrics, columns).
    """
    count = cost.shape[1]
    pairs = []
    precedes = np.zeros((count, count), dtype=bool)
    for column in range(count):
        cheaper = (cost[:, :column] <= cost[:, column : column + 1]).all(axis=0)
        known = precedes[column, :column]
        while (new := np.flatnonzero(cheaper & ~known)).size:
            pairs.append((column, int(new[-1])))
            known |= precedes[new[-1], :column]
            known[new[-1]] = True
    return pairs

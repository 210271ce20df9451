"""The core of a branch: the decisions that reduced-cost fixing leaves open, as integer columns.

A decision is left open if the relaxation loses at most `depth` by being forced to it. An
assignment that does something else is worth less than the relaxation's bound minus `depth`; so a
core whose best assignment reaches that value holds the best of the whole branch (the expanding
core of Pisinger 1995, doi:10.1016/0377-2217(94)00013-3, with Lagrangian bounds).

A column is a step: of a site from one open count to the next, or of an undecided layer from off to
on with its sites at their first open counts. Needless choices are taken out:

- Twins. Of k layers, or k sites, with equal tables it matters only how many take a step, so one
  column with values 0 ... k stands for that step of all of them.
- Loose steps. Where no step of a site costs less than the one before it or is worth more, any set
  of its steps can be exchanged for as many first ones. Wherever in the model such steps are, a step
  that is worth at least as much as another, and costs no more, is taken before it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace
from itertools import groupby, pairwise

import numpy as np

from planner.solver.branch import Assignment, Branch
from planner.solver.problem import Costs, Flags, Ints
from planner.solver.relaxation import Relaxation


@dataclass(frozen=True, order=True)
class Step:
    """What one step adds: integer units of utility, and cost per metric."""

    utility: int
    cost: tuple[int, ...]


Steps = tuple[Step, ...]

#: A unit that is off whatever the columns say.
ALWAYS_OFF = -1


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

    def add_chain(self, steps: Steps, members: list[int], after: int | None = None) -> None:
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


@dataclass(frozen=True, eq=False)
class Core:
    """Maximise utility over integer columns, with costs within a room."""

    base: Assignment  # with every column at 0; it need not fit
    utility: Ints  # (columns,): of a column per unit
    cost: Costs  # (binding metrics, columns): of a column per unit
    upper: Ints  # (columns,): largest value; the smallest is 0
    order: list[tuple[int, int]]  # columns a, b: value a / upper a is at most value b / upper b
    room: Costs  # (binding metrics,): what `base` leaves; other metrics cannot be exceeded
    # (unit, unit, loss when both are off), where neither is always on. A unit is `ALWAYS_OFF`, or
    # a column, which is off at 0 and on at 1.
    pairs: list[tuple[int, int, int]]
    _branch: Branch
    _open: list[Ints]
    _members: list[list[int]]

    @staticmethod
    def of(branch: Branch, relaxation: Relaxation, depth: float) -> Core:
        """The decisions that lose at most `depth`."""
        off_loss = np.where(branch.optional, np.maximum(-relaxation.worth, 0.0), 0.0)
        is_open = relaxation.loss + off_loss[branch.site_layer, None] <= depth
        undecided = branch.optional & (np.abs(relaxation.worth) <= depth)
        settled_on = relaxation.assignment.on & ~undecided
        # Sites of layers that are off have no open count; the first will do, for it is not used.
        is_open[:, 0] |= ~(settled_on | undecided)[branch.site_layer]
        open_counts = [np.flatnonzero(row) for row in is_open]
        first = np.array([counts[0] for counts in open_counts], dtype=np.int64)
        final = np.array([counts[-1] for counts in open_counts], dtype=np.int64)

        base = branch.assign(settled_on, first)
        most = branch.assign(settled_on | undecided, final)
        binding = most.cost > branch.room
        columns = Columns()
        paired = _paired_units(branch)
        undecided_layers = np.flatnonzero(undecided).tolist()
        _add_layers(columns, branch, undecided_layers, open_counts, binding, paired)
        settled_sites = np.flatnonzero(settled_on[branch.site_layer]).tolist()
        _add_sites(columns, branch, settled_sites, open_counts, binding, paired)
        cost = np.array([step.cost for step in columns.steps], dtype=np.int64)
        return Core(
            base=base,
            utility=np.array([step.utility for step in columns.steps], dtype=np.int64),
            cost=cost.reshape(len(columns.steps), int(binding.sum())).T,
            upper=np.array([len(members) for members in columns.members], dtype=np.int64),
            order=columns.order,
            room=(branch.room - base.cost)[binding],
            pairs=_pairs(columns, branch, settled_on, undecided, first),
            _branch=branch,
            _open=open_counts,
            _members=columns.members,
        )

    def assignment(self, values: list[int]) -> Assignment:
        """The assignment that the columns' values mean, worth no less and costing no more."""
        sites = self._branch.sites
        steps = np.zeros(sites + self._branch.layers, dtype=np.int64)
        for members, value in zip(self._members, values):
            np.add.at(steps, members[:value], 1)
        counts = [counts[taken] for counts, taken in zip(self._open, steps.tolist())]
        on = self.base.on | (steps[sites:] > 0)
        return self._branch.assign(on, np.array(counts, dtype=np.int64))


def _paired_units(branch: Branch) -> Flags:
    """Which units are in a pair, so that no other can stand for them."""
    found = np.zeros(branch.layers + branch.sites, dtype=bool)
    if branch.pairs is not None:
        found[branch.pairs.first] = found[branch.pairs.second] = True
    return found


def _pairs(
    columns: Columns, branch: Branch, on: Flags, undecided: Flags, first: Ints
) -> list[tuple[int, int, int]]:
    """The pairs that can fall due in the core."""
    if branch.pairs is None:
        return []
    column_of: dict[int, int] = {}
    for column, members in enumerate(columns.members):
        for member in members:
            column_of.setdefault(member, column)

    def unit(number: int) -> int | None:
        """None where the unit is never off."""
        if number < branch.layers:
            fixed = None if on[number] else ALWAYS_OFF
            return column_of[branch.sites + number] if undecided[number] else fixed
        site = number - branch.layers
        layer = int(branch.site_layer[site])
        if undecided[layer] and first[site]:
            return column_of[branch.sites + layer]
        if on[layer] and first[site]:
            return None
        return column_of.get(site, ALWAYS_OFF)

    found = []
    for a, b, loss in zip(*(x.tolist() for x in vars(branch.pairs).values())):
        one, other = unit(a), unit(b)
        if one is not None and other is not None:
            found.append((one, other, loss))
    return found


def _add_layers(
    columns: Columns,
    branch: Branch,
    layers: list[int],
    open_counts: list[Ints],
    binding: Flags,
    paired: Flags,
) -> None:
    """Undecided layers, those with equal tables together."""
    branch = replace(branch, pairs=None)
    first = np.array([counts[0] for counts in open_counts], dtype=np.int64)
    twins: dict[tuple[Step, tuple[Steps, ...], int | None], list[int]] = defaultdict(list)
    for layer in layers:
        alone = branch.assign(np.arange(branch.layers) == layer, first)
        entry = Step(alone.utility - branch.utility, tuple(alone.cost[binding].tolist()))
        sites = np.flatnonzero(branch.site_layer == layer).tolist()
        chains = tuple(_steps(branch, site, open_counts[site], binding) for site in sites)
        units = [layer, *(branch.layers + site for site in sites)]
        twins[entry, chains, layer if paired[units].any() else None].append(layer)
    for (entry, chains, _), equal in twins.items():
        on = columns.add(entry, [branch.sites + layer for layer in equal])
        sites_of = [np.flatnonzero(branch.site_layer == layer).tolist() for layer in equal]
        for chain, members in zip(chains, zip(*sites_of)):
            columns.add_chain(chain, list(members), on)


def _add_sites(
    columns: Columns,
    branch: Branch,
    sites: list[int],
    open_counts: list[Ints],
    binding: Flags,
    paired: Flags,
) -> None:
    """Sites of layers that are on: loose steps by themselves, others in chains."""
    loose: list[tuple[Step, int]] = []
    twins: dict[Steps, list[int]] = defaultdict(list)
    for site in sites:
        chain = _steps(branch, site, open_counts[site], binding)
        if paired[branch.layers + site]:
            columns.add_chain(chain, [site])
        elif are_loose(chain):
            loose += [(step, site) for step in chain]
        else:
            twins[chain].append(site)
    for chain, equal in twins.items():
        columns.add_chain(chain, equal)
    columns.add_loose(loose)


def _steps(branch: Branch, site: int, counts: Ints, binding: Flags) -> Steps:
    """The steps of a site from each of its open counts to the next."""
    utility = np.diff(branch.gain[site, counts]).tolist()
    cost = np.diff(branch.cost[binding][:, site, counts]).T.tolist()
    return tuple(Step(gain, tuple(price)) for gain, price in zip(utility, cost))

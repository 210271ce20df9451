"""Best-first search over branches, each solved on a core that grows until its best is proven.

Branches wait in order of an upper bound that is tightened as they come up: first by prices that a
neighbour has already paid for, then by the branch's own linear program. The first branch whose
bound does not beat the best answer ends the search, for all that wait behind it have lower ones.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import count

import numpy as np

from planner.solver.branch import Assignment, Branch
from planner.solver.core import Core
from planner.solver.cpsat import solve_core
from planner.solver.layer_sets import (
    layer_sets,
    lifted,
    pairs_of_layers,
    tightest,
    with_layers,
)
from planner.solver.pairs import additive_bound, without_layer_pairs
from planner.solver.problem import Flags, Floats
from planner.solver.relaxation import Relaxation, best_prices, relax
from planner.solver.rounding import improve, round_down

# The first core has about this many columns; while it has not settled the branch it is made deeper.
_FIRST_COLUMNS = 64
_GROWTH = 3
# A core with more takes longer to write down than it is worth.
_MOST_COLUMNS = 10_000
# Sets of layers that are looked at one by one; of which the best are rounded first, in rounds.
_MOST_SETS, _ROUNDED, _TRIES = 4096, 8, 4
_NOTHING = -(1 << 62)

# What is known of a waiting candidate's bound.
_UNSEEN, _SCREENED, _REFINED = range(3)


@dataclass(frozen=True)
class Candidate:
    """A branch that is built only once it comes up."""

    bound: int  # on its utility, in integer units
    build: Callable[[], Branch]  # its cheapest assignment must fit


@dataclass(frozen=True)
class Outcome:
    """Where a search ended."""

    index: int  # of the candidate with the best answer
    assignment: Assignment  # the answer
    bound: int  # no assignment of any candidate has a larger utility, in integer units


@dataclass(frozen=True, eq=False)
class _Node:
    """A branch of a candidate, or of some of its layers."""

    index: int  # of the candidate
    branch: Branch
    origin: Branch | None = None  # the candidate's, where only the layers `on` are left of it
    on: Flags = field(default_factory=lambda: np.zeros(0, dtype=bool))

    @cached_property
    def above(self) -> Branch:
        """A branch without pairs in which everything is worth at least as much."""
        return additive_bound(self.branch)

    @cached_property
    def without_layer_pairs(self) -> Branch:
        """The same of pairs other than of two layers, which are left out."""
        return additive_bound(without_layer_pairs(self.branch))

    @property
    def has_layer_pairs(self) -> bool:
        """Whether layers can be divided by what they lose together."""
        return self.origin is None and bool(pairs_of_layers(self.branch).any())

    def part(self, on: Flags) -> _Node:
        """The same with some layers on and no others."""
        return _Node(self.index, with_layers(self.branch, on), self.branch, on)

    def whole(self, assignment: Assignment) -> Assignment:
        """An assignment of this, or without pairs, as one of the candidate."""
        if self.origin is None:
            return self.branch.assign(assignment.on, assignment.counts)
        return lifted(self.origin, self.on, assignment)


@dataclass(eq=False)
class Search:
    """The state of a search for the best assignment over all candidates."""

    candidates: Sequence[Candidate]  # at least one
    deadline: float  # on `time.perf_counter`'s clock; the search then ends with what it has
    best: tuple[int, Assignment] | None = None  # of which candidate; at first one that is known
    # No assignment of a branch that was worked through is worth more than this, or the best one.
    settled: int = _NOTHING

    @property
    def utility(self) -> int:
        """Of the best answer so far."""
        return _NOTHING if self.best is None else self.best[1].utility

    @property
    def target(self) -> int:
        """The smallest utility that is still of interest."""
        return _NOTHING if self.best is None else self.utility + 1

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.perf_counter()

    def offer(self, index: int, assignment: Assignment) -> None:
        """Remember an answer if it is the best so far."""
        if assignment.utility > self.utility:
            self.best = (index, assignment)

    def run(self) -> Outcome:
        """Work through the candidates, the highest bound first."""
        waiting = [(-c.bound, number, _UNSEEN) for number, c in enumerate(self.candidates)]
        heapq.heapify(waiting)
        # By number: of the candidates, and behind them of those that pairs of layers divide.
        nodes: dict[int, _Node] = {}
        relaxations: dict[int, Relaxation] = {}
        prices: Floats | None = None
        numbers = count(len(self.candidates))
        while waiting and -waiting[0][0] >= self.target:
            if self.best is not None and self.seconds_left < 0:
                break
            negative, number, stage = heapq.heappop(waiting)
            bound = -negative
            if number not in nodes:
                nodes[number] = _Node(number, self.candidates[number].build())
            node = nodes[number]
            if stage == _REFINED:
                parts = self.divided(node, relaxations[number]) if node.has_layer_pairs else None
                if parts is None:
                    self.settle(node, relaxations[number])
                for part, ceiling in parts or ():
                    new = next(numbers)
                    nodes[new] = part
                    heapq.heappush(waiting, (-min(bound, ceiling), new, _UNSEEN))
                continue
            if stage == _UNSEEN and prices is not None:
                relaxation, stage = relax(node.above, prices), _SCREENED
            else:
                # Half of what is left: rounding and improving take time as well.
                prices = best_prices(node.above, self.seconds_left / 2)
                relaxation, stage = relax(node.above, prices), _REFINED
                relaxations[number] = relaxation
                self.round(node, relaxation)
            heapq.heappush(waiting, (-min(bound, relaxation.bound), number, stage))
        assert self.best is not None
        open_bound = -waiting[0][0] if waiting else _NOTHING
        bound = max(self.settled, open_bound, self.utility)
        return Outcome(self.best[0], self.best[1], bound)

    def round(self, node: _Node, relaxation: Relaxation) -> None:
        """Offer what prices lead to."""
        rounded = round_down(node.above, relaxation)
        entry = relaxation.assignment.counts
        rounded = improve(node.above, rounded, relaxation.prices, entry, self.deadline)
        self.offer(node.index, node.whole(rounded))

    def divided(self, node: _Node, relaxation: Relaxation) -> list[tuple[_Node, int]] | None:
        """Branches of the sets of layers that may hold the best; None where these are too many."""
        branch, above = node.branch, node.without_layer_pairs
        prices = relaxation.prices
        for _ in range(_TRIES):
            sets = layer_sets(branch, above, prices, self.target, _MOST_SETS)
            before = self.utility
            for on in sets.on[:_ROUNDED]:
                part = node.part(on)
                if part.branch.fits(part.branch.cheapest().cost):
                    self.round(part, relax(part.above, best_prices(part.above)))
            if sets.complete:
                break
            tighter = tightest(branch, above, prices, self.target)
            if (self.utility == before and (tighter == prices).all()) or self.seconds_left < 0:
                return None
            prices = tighter
        else:
            return None
        parts = [(node.part(on), int(bound)) for on, bound in zip(sets.on, sets.bound)]
        return [
            (part, bound)
            for part, bound in parts
            if bound >= self.target and part.branch.fits(part.branch.cheapest().cost)
        ]

    def settle(self, node: _Node, relaxation: Relaxation) -> None:
        """Find the best of one branch, or prove that it does not beat the best so far."""
        branch = node.branch
        losses = np.sort(np.concatenate([relaxation.loss.ravel(), np.abs(relaxation.worth)]))
        columns = _FIRST_COLUMNS
        covered: float = -1
        while (reach := relaxation.bound - self.target) > covered:
            # Every site has one count that loses nothing: the one that the relaxation takes.
            wanted = branch.sites + columns
            depth = min(float(losses[wanted]), reach) if wanted < len(losses) else reach
            columns *= _GROWTH
            if depth <= covered:
                continue
            size = np.searchsorted(losses, depth, side="right") - branch.sites
            if self.seconds_left < 0 or size > _MOST_COLUMNS:
                self.settled = max(self.settled, relaxation.bound)
                return
            last = depth == reach
            rounds = None if last else 1
            core = Core.of(branch, relaxation, depth + relaxation.margin)
            answer = solve_core(core, self.target, relaxation.bound, self.seconds_left, rounds)
            if answer.assignment is not None:
                self.offer(node.index, node.whole(answer.assignment))
            if last:
                self.settled = max(self.settled, answer.bound)
                return
            if answer.finished:
                covered = depth
        self.settled = max(self.settled, min(relaxation.bound, self.target - 1))

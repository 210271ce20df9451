"""Best-first search over branches, each solved on a core that grows until its best is proven.

Branches wait in order of an upper bound that is tightened as they come up: first by prices that a
neighbour has already paid for, then by the branch's own linear program. The first branch whose
bound does not beat the best answer ends the search, for all that wait behind it have lower ones.
"""

from __future__ import annotations

import heapq
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from planner.solver.branch import Assignment, Branch
from planner.solver.core import Core
from planner.solver.cpsat import solve_core
from planner.solver.pairs import additive_bound
from planner.solver.relaxation import Floats, Relaxation, best_prices, relax
from planner.solver.rounding import improve, round_down

# The first core has about this many columns; while it has not settled the branch it is made deeper.
_FIRST_COLUMNS = 64
_GROWTH = 3
# A core with more takes longer to write down than it is worth.
_MOST_COLUMNS = 10_000
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
        waiting = [(-c.bound, index, _UNSEEN) for index, c in enumerate(self.candidates)]
        heapq.heapify(waiting)
        branches: dict[int, Branch] = {}
        # What bounds are taken of.
        additive: dict[int, Branch] = {}
        relaxations: dict[int, Relaxation] = {}
        prices: Floats | None = None
        while waiting and -waiting[0][0] >= self.target:
            if self.best is not None and self.seconds_left < 0:
                break
            negative, index, stage = heapq.heappop(waiting)
            bound = -negative
            if stage == _UNSEEN:
                branches[index] = self.candidates[index].build()
                additive[index] = additive_bound(branches[index])
            branch, above = branches[index], additive[index]
            if stage == _REFINED:
                self.settle(index, branch, relaxations[index])
                continue
            if stage == _UNSEEN and prices is not None:
                relaxation, stage = relax(above, prices), _SCREENED
            else:
                # Half of what is left: rounding and improving take time as well.
                prices = best_prices(above, self.seconds_left / 2)
                relaxation, stage = relax(above, prices), _REFINED
                relaxations[index] = relaxation
                rounded = round_down(above, relaxation)
                rounded = improve(above, rounded, relaxation, self.deadline)
                self.offer(index, branch.assign(rounded.on, rounded.counts))
            heapq.heappush(waiting, (-min(bound, relaxation.bound), index, stage))
        assert self.best is not None
        open_bound = -waiting[0][0] if waiting else _NOTHING
        bound = max(self.settled, open_bound, self.utility)
        return Outcome(self.best[0], self.best[1], bound)

    def settle(self, index: int, branch: Branch, relaxation: Relaxation) -> None:
        """Find the best of one branch, or prove that it does not beat the best so far."""
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
                self.offer(index, answer.assignment)
            if last:
                self.settled = max(self.settled, answer.bound)
                return
            if answer.finished:
                covered = depth
        self.settled = max(self.settled, min(relaxation.bound, self.target - 1))

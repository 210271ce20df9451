"""The ladder: the plans a server may run, made ahead, from the cheapest to the base model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from planner.ir.errors import InputError
from planner.plan import Plan


@dataclass(frozen=True)
class Rung:
    """One plan of the ladder, and the fraction of the base model's FLOPs it was made for."""

    budget: float
    plan: Plan


@dataclass(frozen=True)
class Ladder:
    """Rungs by ascending budget; a request runs one of them.

    Plans of any other budget would have to be made, and warmed up, while others wait.
    """

    rungs: tuple[Rung, ...]

    @staticmethod
    def of(plans: Sequence[tuple[float, Plan]]) -> Ladder:
        """From budgets and their plans, in any order."""
        return Ladder(tuple(Rung(*pair) for pair in sorted(plans, key=lambda pair: pair[0])))

    def within(self, budget: float | None) -> int:
        """The dearest rung within a budget; the dearest of all where there is none.

        Raises:
            InputError: even the cheapest costs more.
        """
        if budget is None:
            return len(self.rungs) - 1
        fitting = [i for i, rung in enumerate(self.rungs) if rung.budget <= budget + 1e-9]
        if not fitting:
            raise InputError(
                f"budget {budget:g} is below {self.rungs[0].budget:g}, the least that this server "
                "has a plan for"
            )
        return fitting[-1]

"""The ladder: the plans a server may run, made ahead, from the cheapest to the base model."""

from __future__ import annotations

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

    def within(self, budget: float | None) -> int:
        """The dearest rung within a budget, InputError where even the cheapest costs more; the
        dearest of all where there is none."""
        if budget is None:
            return len(self.rungs) - 1
        fitting = [i for i, rung in enumerate(self.rungs) if rung.budget <= budget + 1e-9]
        if not fitting:
            raise InputError(
                f"budget {budget:g} is below {self.rungs[0].budget:g}, the least that this server "
                "has a plan for"
            )
        return fitting[-1]

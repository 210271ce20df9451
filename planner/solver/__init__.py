"""Solvers of a `Problem`: exact, from a precomputed frontier, and by a rule.

Enters: a `Problem`. Leaves: a `Solution`, which is a choice with its certificate (bound and gap),
or a bare `Choice` from the rule. Nothing here knows of graphs, models or devices.

    problem                                   what is to be solved, and answers to it
    branch -> relaxation -> rounding          tables of one token option, its bounds, first answers
    columns -> core -> cpsat -> search        what bounds leave open, solved by OR-Tools, in order
    hull                                      all limits of one metric at once
    exact, equal_widths | frontier | greedy   the solvers, on top of the above
"""

from planner.solver.equal_widths import solve_uniform
from planner.solver.exact import solve
from planner.solver.frontier import Frontier
from planner.solver.greedy import Scores, take_while_fits
from planner.solver.solution import TOLERANCE, Infeasible, Solution

__all__ = [
    "TOLERANCE",
    "Frontier",
    "Infeasible",
    "Scores",
    "Solution",
    "solve",
    "solve_uniform",
    "take_while_fits",
]

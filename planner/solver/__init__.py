"""Solvers of a `Problem`: exact, from a precomputed frontier, and by a rule.

Enters: a `Problem`. Leaves: a `Solution`, which is a choice with its certificate (bound and gap),
or a bare `Choice` from the rule. Nothing here knows of graphs, models or devices.

    problem         what is to be solved, and answers to it
    solution        an answer with its certificate
    reach           what fits no limit is worth nothing
    pairs           what is lost together, and its additive bounds
    layer_sets      which layers are on, where pairs of layers are lost together
    branch          the integer tables of one token option
    linear_program  a branch in shares, for dual values
    relaxation      bounds of a branch
    rounding        first answers
    core            what bounds leave open, as integer columns
    cpsat           a core solved by OR-Tools
    search          branches in the order of their bounds
    exact           the exact solver, of all of these
    equal_widths    the best choice with equal counts in every layer
    option_bounds   bounds of all token options at once
    rungs           the best choices at falling prices
    frontier        answers for any prompt and any limits in a millisecond or two, from rungs
    greedy          the rule: take switches while they fit
"""

from planner.solver.equal_widths import solve_uniform
from planner.solver.exact import solve
from planner.solver.frontier import Frontier, Prices
from planner.solver.greedy import take_while_fits
from planner.solver.solution import TOLERANCE, Infeasible, Solution

__all__ = [
    "TOLERANCE",
    "Frontier",
    "Infeasible",
    "Prices",
    "Solution",
    "solve",
    "solve_uniform",
    "take_while_fits",
]

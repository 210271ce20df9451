from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import best_by_enumeration, best_by_table, frontier_of, medium_problem, problems

from planner.solver import Infeasible, solve
from planner.solver.branch import Tables
from planner.solver.problem import Choice
from planner.solver.relaxation import best_prices, relax


@settings(max_examples=150, deadline=None)
@given(problems(), st.integers(0, 2), st.sampled_from([-0.1, 0.0, 0.1, 0.3, 0.5, 0.7, 1.0]))
def test_every_limit_has_a_feasible_choice_and_a_bound_that_holds(problem, which, share):
    if not problem.metrics:
        return
    metric = which % len(problem.metrics)
    most = max(
        int(problem.cost(Choice.everything(problem, option))[metric])
        for option in range(len(problem.tokens))
    )
    limits = problem.limits.copy()
    limits[metric] = int(most * share)
    limited = replace(problem, limits=limits)
    best = best_by_enumeration(limited)
    frontier = frontier_of(problem, problem.metrics[metric])
    if best is None:
        with pytest.raises(Infeasible):
            frontier(int(limits[metric]))
        return
    solution = frontier(int(limits[metric]))
    assert limited.is_feasible(solution.choice)
    assert solution.utility <= best + 1e-9 * max(1.0, abs(best))
    assert solution.bound >= best - 1e-12 * abs(best)
    assert (solution.status == "optimal") == (solution.gap <= 1e-9)


def linear_program_bound(problem):
    """The bound of the best token option, by GLOP instead of by hulls."""
    tables = Tables(problem)
    branches = [tables.branch(option) for option in range(len(problem.tokens))]
    feasible = [branch for branch in branches if branch.fits(branch.cheapest().cost)]
    return max(tables.scale.real(relax(branch, best_prices(branch)).bound) for branch in feasible)


@pytest.mark.parametrize("tables", ["equal", "rounded", "stairs", "random"])
def test_the_gap_is_small_and_the_bound_is_that_of_the_linear_program(tables):
    problem = medium_problem(5, tables, "gamma", alike=False)
    frontier = frontier_of(problem, "metric0")
    base = int(problem.cost(Choice.everything(problem))[0])
    for share in np.linspace(0.2, 1.0, 17):
        limit = int(base * share)
        solution = frontier(limit)
        limited = replace(problem, limits=np.array([limit]))
        best = best_by_table(limited)
        assert solution.bound == pytest.approx(linear_program_bound(limited), rel=1e-6)
        assert solution.utility <= best + 1e-9 <= solution.bound + 2e-9
        # One switch of the 84 is up to a twentieth of all utility, one stair up to a seventh.
        assert solution.gap < 0.05
        assert solution.utility > 0.98 * best


def test_more_is_never_worse_in_the_bound():
    problem = medium_problem(6, "random", "gamma", alike=False)
    frontier = frontier_of(problem, "metric0")
    base = int(problem.cost(Choice.everything(problem))[0])
    bounds = [frontier(int(base * share)).bound for share in np.linspace(0.1, 1.2, 23)]
    assert bounds == sorted(bounds)
    everything = frontier(base)
    assert everything.choice == Choice.everything(problem)
    assert everything.status == "optimal"


def test_an_answer_is_the_same_every_time_and_leaves_the_problem_alone():
    problem = medium_problem(7, "random", "uniform", alike=True)
    frontier = frontier_of(problem, "metric0")
    limit = int(problem.limits[0])
    first = frontier(limit)
    frontier(limit * 2)
    assert frontier(limit) == first
    assert problem.limits.tolist() == [limit]
    assert first.bound >= solve(problem).utility

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import (
    best_by_enumeration,
    best_by_mixed_integer_program,
    best_by_table,
    best_by_trying,
    frontier_of,
    medium_problem,
    paired_problem,
    problems,
)

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
    """The bound of the best token option, by GLOP instead of by rungs."""
    tables = Tables(problem)
    branches = [tables.branch(option) for option in range(len(problem.tokens))]
    feasible = [branch for branch in branches if branch.fits(branch.cheapest().cost)]
    return max(tables.scale.real(relax(branch, best_prices(branch)).bound) for branch in feasible)


@pytest.mark.parametrize("tables", ["equal", "rounded", "stairs", "random"])
def test_the_gap_is_small_and_the_bound_near_that_of_the_linear_program(tables):
    problem = medium_problem(5, tables, "gamma", alike=False)
    frontier = frontier_of(problem, "metric0")
    base = int(problem.cost(Choice.everything(problem))[0])
    for share in np.linspace(0.2, 1.0, 17):
        limit = int(base * share)
        solution = frontier(limit)
        limited = replace(problem, limits=np.array([limit]))
        best = best_by_table(limited)
        assert solution.bound == pytest.approx(linear_program_bound(limited), rel=1e-3)
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


@pytest.mark.parametrize("tables", ["equal", "rounded", "stairs", "random"])
def test_several_limits_are_used_well_whichever_binds(tables):
    problem = medium_problem(9, tables, "gamma", alike=False, metrics=2)
    frontier = frontier_of(problem, "metric0")
    base = int(problem.cost(Choice.everything(problem))[0])
    for share in (0.3, 0.45, 0.6, 0.8):
        limits = problem.limits.copy()
        limits[0] = int(base * share)
        limited = replace(problem, limits=limits)
        solution = frontier(int(limits[0]))
        assert limited.is_feasible(solution.choice)
        best = best_by_mixed_integer_program(limited)
        assert 0.97 * best < solution.utility <= best + 1e-9 <= solution.bound + 2e-9


@pytest.mark.parametrize("seed", range(200))
def test_pairs_are_counted_and_cost_nobody_anything(seed):
    """By brute force; and who counts pairs is never worse off for it."""
    problem = paired_problem(seed)
    limit = int(problem.limits[0])
    solution = frontier_of(problem, "a")(limit)
    best = best_by_trying(problem)
    assert problem.is_feasible(solution.choice)
    assert solution.utility == pytest.approx(problem.utility(solution.choice), abs=1e-9)
    assert solution.utility <= best + 1e-9 <= solution.bound + 2e-9
    alone = frontier_of(problem.additive(), "a")(limit)
    assert solution.utility >= problem.utility(alone.choice) - 1e-9


def test_most_answers_with_pairs_are_the_best():
    found = []
    for seed in range(200):
        problem = paired_problem(seed)
        solution = frontier_of(problem, "a")(int(problem.limits[0]))
        found.append(solution.utility >= best_by_trying(problem) - 1e-9)
    assert np.mean(found) > 0.8

import contextlib
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from problems import best_uniform_by_enumeration, medium_problem, problems

from planner.ir.errors import InputError
from planner.solver import Infeasible, solve, solve_uniform
from planner.solver.problem import LayerChoices


def counts(problem, choice):
    """Counts of the sites of every running layer that has sites."""
    return {
        tuple(len(choice.kept[site.name]) for site in layer.sites)
        for layer, on in zip(problem.layers, choice.layers_on)
        if on and layer.sites
    }


@settings(max_examples=120, deadline=None)
@given(problems(alike=True))
def test_optimum_is_that_of_enumeration(problem):
    best = best_uniform_by_enumeration(problem)
    if best is None:
        with pytest.raises(Infeasible):
            solve_uniform(problem)
        return
    solution = solve_uniform(problem)
    assert problem.is_feasible(solution.choice)
    assert len(counts(problem, solution.choice)) <= 1
    assert solution.utility == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert solution.status == "optimal"


@pytest.mark.parametrize("metrics", [1, 2])
def test_equal_counts_cost_some_utility(metrics):
    problem = medium_problem(3, "random", "gamma", alike=False, metrics=metrics)
    uniform, free = solve_uniform(problem), solve(problem)
    assert uniform.status == "optimal"
    assert len(counts(problem, uniform.choice)) == 1
    assert len(counts(problem, free.choice)) > 1
    assert uniform.utility < free.utility


@pytest.mark.parametrize("allowed", [(0,), (2, 5), (1, 3, 6)])
def test_counts_can_be_prescribed(allowed):
    problem = medium_problem(3, "random", "gamma", alike=True)
    kinds = [site.name.partition(".")[0] for site in problem.layers[0].sites]
    found = {}
    for count in allowed:
        with contextlib.suppress(Infeasible):
            found[count] = solve_uniform(problem, counts={kinds[0]: (count,)}).utility
    if not found:
        with pytest.raises(Infeasible, match="none of the equal counts"):
            solve_uniform(problem, counts={kinds[0]: allowed})
        return
    solution = solve_uniform(problem, counts={kinds[0]: allowed})
    assert problem.is_feasible(solution.choice)
    assert solution.utility == pytest.approx(max(found.values()))
    assert {kept[0] for kept in counts(problem, solution.choice)} <= set(allowed)


def test_layers_without_sites_are_exempt():
    problem = medium_problem(3, "equal", "gamma", alike=True)
    plain = LayerChoices("plain", 1.0, np.full((3, 1), 1, dtype=np.int64))
    solution = solve_uniform(replace(problem, layers=(*problem.layers, plain)))
    assert solution.choice.layers_on[-1]


def test_layers_of_different_shape_are_refused():
    problem = medium_problem(3, "equal", "gamma", alike=True)
    first, *rest = problem.layers
    odd = replace(first, sites=first.sites[:1])
    with pytest.raises(InputError, match=r"\[6\] and \[6, 8\] switches"):
        solve_uniform(replace(problem, layers=(odd, *rest)))

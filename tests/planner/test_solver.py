"""The exact solver against enumeration and dynamic programming, and what it refuses."""

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import best_by_enumeration, best_by_table, problems

from planner.ir.errors import InputError
from planner.problem import Choice, LayerChoices, Problem, SiteChoices, TokenOption, top
from planner.solver import Infeasible, search, solve


def assert_optimal(problem, solution, best):
    assert problem.is_feasible(solution.choice)
    assert solution.cost == dict(zip(problem.metrics, problem.cost(solution.choice).tolist()))
    assert solution.utility == problem.utility(solution.choice)
    assert solution.utility == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert solution.bound >= best - 1e-12 * abs(best)
    assert solution.bound >= solution.utility
    assert solution.status == "optimal"
    assert solution.gap <= 1e-9


@settings(max_examples=300, deadline=None)
@given(problems())
def test_same_optimum_as_enumeration(problem):
    best = best_by_enumeration(problem)
    if best is None:
        with pytest.raises(Infeasible):
            solve(problem)
    else:
        assert_optimal(problem, solve(problem), best)


@pytest.fixture
def no_first_answers(monkeypatch):
    """Start from the cheapest choice and the smallest cores, so that CP-SAT has to find the rest."""
    monkeypatch.setattr(search, "round_down", lambda branch, relaxation: branch.cheapest())
    monkeypatch.setattr(search, "improve", lambda branch, start, relaxation: start)
    monkeypatch.setattr(search, "_FIRST_COLUMNS", 1)

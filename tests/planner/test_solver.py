"""The exact solver against enumeration and dynamic programming, and what it refuses."""

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from problems import (
    best_by_enumeration,
    best_by_mixed_integer_program,
    best_by_table,
    medium_problem,
    problems,
)

from planner.ir.errors import InputError
from planner.solver import Infeasible, search, solve
from planner.solver.branch import Scale, Tables
from planner.solver.problem import Choice, LayerChoices, Problem, SiteChoices, TokenOption
from planner.solver.reach import within_reach
from planner.solver.relaxation import relax


def assert_optimal(problem, solution, best):
    assert problem.is_feasible(solution.choice)
    assert solution.cost == dict(zip(problem.metrics, problem.cost(solution.choice).tolist()))
    assert solution.utility == problem.utility(solution.choice)
    assert solution.utility == pytest.approx(best, rel=1e-12, abs=1e-9)
    assert solution.bound >= max(best - 1e-12 * abs(best), solution.utility)
    assert solution.status == "optimal"
    assert solution.gap <= 1e-9


@settings(max_examples=300, deadline=None)
@given(problems())
def test_optimum_is_that_of_enumeration(problem):
    best = best_by_enumeration(problem)
    if best is None:
        with pytest.raises(Infeasible):
            solve(problem)
    else:
        assert_optimal(problem, solve(problem), best)


def test_optimum_is_that_of_enumeration_when_cp_sat_does_all_the_work(monkeypatch):
    # Start from the cheapest choice and from the smallest cores.
    monkeypatch.setattr(search, "round_down", lambda branch, relaxation: branch.cheapest())
    monkeypatch.setattr(search, "improve", lambda branch, start, *rest: start)
    monkeypatch.setattr(search, "_FIRST_COLUMNS", 1)

    @settings(max_examples=120, deadline=None)
    @given(problems())
    def run(problem):
        best = best_by_enumeration(problem)
        if best is not None:
            assert_optimal(problem, solve(problem), best)

    run()


@pytest.mark.parametrize(("worse", "better"), [(-1.0, 0.0), (-1.0, -0.5), (-1.0, 2.0)])
def test_of_switches_that_cost_utility_the_least_harmful_is_kept(worse, better):
    """One has to stay and two do not fit, so what the worse one is worth is out of reach."""
    costs = np.array([[[0, 0, 1]]])
    site = SiteChoices("0.0", np.array([worse, better]), costs, minimum=1)
    problem = Problem(
        ("metric",),
        np.array([0]),
        (TokenOption((1,), 0.0, np.array([0])),),
        (LayerChoices("0", 0.0, np.array([[0]]), (site,), optional=False),),
    )
    solution = solve(problem)
    assert solution.choice.kept == {"0.0": (1,)}
    assert_optimal(problem, solution, better)
    # Had it kept the other one, its own bound would tell.
    scale = Scale.of(within_reach(problem))
    assert solution.bound - worse > 0.1 * max(abs(worse), scale.negligible)


@pytest.mark.parametrize("tables", ["equal", "rounded", "stairs", "random"])
@pytest.mark.parametrize("utilities", ["gamma", "whole", "uniform"])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "different"])
def test_optimum_is_that_of_dynamic_programming(tables, utilities, alike):
    for seed in range(8):
        problem = medium_problem(seed, tables, utilities, alike)
        assert_optimal(problem, solve(problem), best_by_table(problem))


@pytest.mark.parametrize("metrics", [2, 3])
@pytest.mark.parametrize("tables", ["equal", "stairs", "random"])
@pytest.mark.parametrize("alike", [True, False], ids=["alike", "different"])
def test_optimum_under_several_limits_is_that_of_a_mixed_integer_program(metrics, tables, alike):
    for seed, utilities in product(range(3), ["gamma", "uniform"]):
        problem = medium_problem(seed, tables, utilities, alike, metrics)
        solution, best = solve(problem), best_by_mixed_integer_program(problem)
        assert solution.status == "optimal"
        assert problem.is_feasible(solution.choice)
        assert solution.utility == pytest.approx(best, rel=1e-6)


def test_out_of_time_there_is_still_a_choice_with_a_bound():
    problem = medium_problem(0, "random", "gamma", alike=False)
    solution = solve(problem, time_limit_seconds=0.0)
    assert problem.is_feasible(solution.choice)
    assert solution.utility <= best_by_table(problem) + 1e-9 <= solution.bound + 2e-9
    assert solution.gap == pytest.approx((solution.bound - solution.utility) / solution.utility)
    assert (solution.status == "optimal") == (solution.gap <= 1e-9)


def test_a_hint_is_a_floor_and_does_not_change_the_optimum():
    problem = medium_problem(1, "random", "gamma", alike=False)
    solution = solve(problem)
    assert solve(problem, hint=solution.choice).utility == solution.utility
    assert solve(problem, hint=solution.choice, time_limit_seconds=0.0).choice == solution.choice
    over = Choice.everything(problem)
    assert not problem.is_feasible(over)
    assert solve(problem, hint=over) == solution
    assert solve(problem, hint=Choice(99, (), {})) == solution


def test_same_problem_same_answer():
    # Many optima: every switch is worth the same.
    for tables in ("equal", "random"):
        problem = medium_problem(2, tables, "uniform", alike=True)
        first, second = solve(problem), solve(problem)
        assert first == second
        assert repr(replace(first, seconds=0.0)) == repr(replace(second, seconds=0.0))


def one_site(limits=(10,), **changes):
    """One token option that costs 1, one layer that costs 2, one site of 3 switches at 2 each."""
    metrics = len(limits)
    site = {
        "name": "heads.0",
        "utilities": np.array([1.0, 3.0, 2.0]),
        "costs": np.tile(np.array([0, 2, 4, 6]), (1, metrics, 1)),
    }
    layer = {"name": "layers.0", "utility": 0.5, "costs": np.full((1, metrics), 2)}
    site |= {key: value for key, value in changes.items() if key in ("utilities", "minimum")}
    layer |= {key: value for key, value in changes.items() if key == "optional"}
    return Problem(
        metrics=tuple(f"metric{n}" for n in range(metrics)),
        limits=np.array(limits),
        tokens=(TokenOption((8,), 0.25, np.full(metrics, 1)),),
        layers=(LayerChoices(**layer, sites=(SiteChoices(**site),)),),
    )


def test_the_best_switches_are_kept():
    solution = solve(one_site(limits=(7,)))
    assert solution.choice == Choice(0, (True,), {"heads.0": (1, 2)})
    assert solution.cost == {"metric0": 7}
    assert solution.utility == solution.bound == 5.75
    assert (solution.gap, solution.status) == (0.0, "optimal")


@pytest.mark.parametrize(
    ("limit", "changes", "kept"),
    [
        (9, {}, (0, 1, 2)),
        (8, {}, (1, 2)),
        (4, {}, ()),
        (2, {}, ()),
        (9, {"utilities": np.array([-1.0, -2.0, -3.0])}, ()),
        (9, {"utilities": np.array([-1.0, -2.0, -3.0]), "minimum": 2, "optional": False}, (0, 1)),
        (9, {"utilities": np.array([5.0, 5.0, 5.0]), "minimum": 1}, (0, 1, 2)),
        (7, {"utilities": np.array([5.0, 5.0, 5.0])}, (0, 1)),
    ],
)
def test_limits_minima_and_negative_utilities(limit, changes, kept):
    problem = one_site(limits=(limit,), **changes)
    assert solve(problem).choice.kept == {"heads.0": kept}


@pytest.mark.parametrize("factor", [1e-300, 1e-12, 1e12, 1e290])
def test_utilities_of_any_magnitude(factor):
    problem = medium_problem(3, "random", "gamma", alike=False)
    scaled = replace(
        problem,
        tokens=tuple(replace(token, utility=token.utility * factor) for token in problem.tokens),
        layers=tuple(
            replace(
                layer,
                utility=layer.utility * factor,
                sites=tuple(replace(s, utilities=s.utilities * factor) for s in layer.sites),
            )
            for layer in problem.layers
        ),
    )
    assert solve(scaled).choice == solve(problem).choice
    assert solve(scaled).status == "optimal"


def test_no_price_makes_the_relaxation_break_a_minimum():
    branch = Tables(one_site(minimum=3, optional=False)).branch(0)
    assert relax(branch, np.array([2.0**70])).assignment.counts.tolist() == [3]


def test_the_smallest_number_is_a_utility():
    layer = LayerChoices("0", 5e-324, np.array([[1]]))
    token = TokenOption((1,), 0.0, np.array([0]))
    solution = solve(Problem(("cost",), np.array([1]), (token,), (layer,)))
    assert (solution.choice.layers_on, solution.status) == ((True,), "optimal")


def test_no_layers_no_metrics():
    token = TokenOption((), 1.0, np.zeros(0, dtype=np.int64))
    solution = solve(Problem((), np.zeros(0, dtype=np.int64), (token,), ()))
    assert (solution.choice, solution.utility, solution.cost) == (Choice(0, (), {}), 1.0, {})


def test_infeasible_says_the_smallest_limit():
    problem = one_site(limits=(6, 7), minimum=2, optional=False)
    with pytest.raises(Infeasible) as error:
        solve(problem)
    assert str(error.value) == (
        "the limits cannot be met: metric0 is limited to 6, and the smallest possible is 7"
    )
    solve(replace(problem, limits=np.array([7, 7])))


def test_infeasible_names_every_limit_that_is_too_low():
    with pytest.raises(Infeasible) as error:
        solve(one_site(limits=(0, -1)))
    for metric, limit in (("metric0", 0), ("metric1", -1)):
        assert f"{metric} is limited to {limit}, and the smallest possible is 1" in str(error.value)


def test_limits_that_only_conflict_together():
    tokens = (
        TokenOption((8,), 1.0, np.array([10, 1])),
        TokenOption((4,), 1.0, np.array([3, 9])),
    )
    problem = Problem(("flops", "kv"), np.array([9, 8]), tokens, ())
    with pytest.raises(Infeasible) as error:
        solve(problem)
    assert "each limit can be met alone but not all together" in str(error.value)
    assert "keep (8,) image tokens, which needs at least flops 10, kv 1" in str(error.value)
    solve(replace(problem, limits=np.array([10, 8])))


def broken(**changes):
    """`one_site` with fields of its only site replaced."""
    problem = one_site()
    layer = problem.layers[0]
    site = replace(layer.sites[0], **changes)
    return replace(problem, layers=(replace(layer, sites=(site,)),))


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (replace(one_site(), tokens=()), "no token option"),
        (replace(one_site(), limits=np.array([1.5])), "limits are float64"),
        (replace(one_site(), limits=np.array([1, 2])), "limits have shape"),
        (broken(costs=np.array([[[0, 2, 1, 6]]])), "heads.0 fall"),
        (broken(costs=np.array([[[-1, 2, 3, 6]]])), "heads.0 include a negative"),
        (broken(costs=np.array([[[0, 2, 4]]])), "heads.0 have shape"),
        (broken(costs=np.array([[[0, 2, 4, 1 << 61]]])), "beyond 2\\^61"),
        (broken(utilities=np.array([1.0, np.nan, 2.0])), "utility of site heads.0"),
        (broken(minimum=4), "minimum of site heads.0 is 4"),
        (replace(one_site(), layers=one_site().layers * 2), "two sites"),
        (
            replace(one_site(), tokens=(TokenOption((8,), np.inf, np.array([1])),)),
            "utility of token option",
        ),
    ],
)
def test_inconsistent_tables_are_refused(problem, words):
    with pytest.raises(InputError, match=words):
        solve(problem)


@pytest.mark.parametrize(
    ("choice", "feasible"),
    [
        (Choice(0, (True,), {"heads.0": (0, 2)}), True),
        (Choice(0, (False,), {"heads.0": ()}), True),
        (Choice(1, (True,), {"heads.0": (0, 2)}), False),
        (Choice(0, (True, True), {"heads.0": (0, 2)}), False),
        (Choice(0, (True,), {}), False),
        (Choice(0, (True,), {"heads.0": (2, 2)}), False),
        (Choice(0, (True,), {"heads.0": (2, 3)}), False),
        (Choice(0, (True,), {"heads.0": (-1, 2)}), False),
        (Choice(0, (True,), {"heads.0": (0,)}), False),
        (Choice(0, (False,), {"heads.0": (0, 1)}), False),
        (Choice(0, (True,), {"heads.0": (0, 1, 2)}), False),
    ],
)
def test_what_counts_as_feasible(choice, feasible):
    problem = one_site(limits=(8,), minimum=2)
    assert problem.is_feasible(choice) is feasible

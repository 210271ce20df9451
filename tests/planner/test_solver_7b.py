"""The solvers on the full LLaVA-1.5 problems of the benchmark: proofs, gaps, time, utilisation.

Time is the process's own, so that a busy machine does not fail a test.
"""

import importlib.util
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from problems import frontier_of

from planner.solver import Infeasible, solve, solve_uniform, take_while_fits
from planner.solver.problem import Choice

PATH = Path(__file__).parents[2] / "benchmarks" / "solver.py"
BUDGETS = (0.5, 0.6, 0.65, 0.75, 0.85, 0.95, 1.0)


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_of_solver", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def timed(problem, **options):
    begin = time.process_time()
    solution = solve(problem, **options)
    return solution, time.process_time() - begin


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("image_tokens", [(576,), (576, 432, 288, 192, 144, 96, 64, 32)])
def test_one_limit_is_proven_within_two_seconds(benchmark, seed, image_tokens):
    problem = benchmark.build(benchmark.SEVEN_B, {"flops": 0.65}, seed, image_tokens)
    assert problem.switches == 32 * (32 + 32 + 1)
    solution, seconds = timed(problem)
    assert solution.status == "optimal"
    assert solution.gap <= 1e-9
    assert seconds < 2


@pytest.mark.parametrize("limits", [{"flops": 0.65, "kv": 0.5}, {"flops": 0.5, "kv": 0.3}])
@pytest.mark.parametrize("image_tokens", [(576,), (576, 432, 288, 192, 144, 96, 64, 32)])
def test_two_limits_are_close_within_five_seconds(benchmark, limits, image_tokens):
    problem = benchmark.build(benchmark.SEVEN_B, limits, 0, image_tokens)
    solution, seconds = timed(problem)
    assert solution.gap <= 1e-4
    assert seconds < 5


def test_thirteen_b_with_wide_mlps(benchmark):
    problem = benchmark.build(benchmark.THIRTEEN_B, {"flops": 0.65, "kv": 0.6}, 0, (576, 288))
    assert problem.switches == 40 * (40 + 108 + 1)
    solution, seconds = timed(problem)
    assert solution.status == "optimal"
    assert seconds < 5


@pytest.mark.parametrize("budget", BUDGETS)
def test_the_budget_is_used(benchmark, budget):
    problem = benchmark.build(benchmark.SEVEN_B, {"flops": budget}, 1, (576,))
    limit = int(problem.limits[0])
    frontier = frontier_of(problem, "flops")
    for solution in (solve(problem), frontier(limit)):
        assert 0.999 * limit <= solution.cost["flops"] <= limit
        assert solution.gap <= 1e-4
    rule = take_while_fits(problem)
    assert 0.999 * limit <= problem.cost(rule)[0] <= limit
    assert problem.is_feasible(rule)
    if budget == 1.0:
        everything = Choice.everything(problem)
        assert solve(problem).choice == frontier(limit).choice == rule == everything


def test_the_frontier_is_close_to_the_optimum_for_any_limit(benchmark):
    problem = benchmark.build(benchmark.SEVEN_B, {"flops": 1.0})
    base = int(problem.limits[0])
    frontier = frontier_of(problem, "flops")
    for share in np.linspace(0.1, 1.0, 19):
        limits = np.array([int(base * share)])
        quick, exact = frontier(int(limits[0])), solve(replace(problem, limits=limits))
        assert quick.utility <= exact.utility * (1 + 1e-12)
        assert quick.bound >= exact.utility
        assert quick.gap <= 5e-4


def test_the_rule_loses_utility_but_never_the_limit(benchmark):
    problem = benchmark.build(benchmark.SEVEN_B, {"flops": 0.65, "kv": 0.5})
    rng = np.random.default_rng(0)
    best = solve(problem).utility
    for _ in range(5):
        scored = problem.with_utilities(rng.normal(size=problem.switches))
        tokens = tuple(replace(token, utility=rng.normal()) for token in scored.tokens)
        choice = take_while_fits(replace(scored, tokens=tokens))
        assert problem.is_feasible(choice)
        assert problem.utility(choice) < best


def test_equal_counts_in_all_layers(benchmark):
    problem = benchmark.build(benchmark.SEVEN_B, {"flops": 0.65}, 0, (576,))
    solution = solve_uniform(problem)
    running = [
        {len(solution.choice.kept[layer.sites[position].name]) for position in (0, 1)}
        for layer, on in zip(problem.layers, solution.choice.layers_on)
        if on
    ]
    assert all(counts == running[0] for counts in running)
    assert solution.status == "optimal"
    assert solution.utility < solve(problem).utility


def test_a_limit_one_below_the_cheapest_is_infeasible_and_the_cheapest_is_not(benchmark):
    problem = benchmark.build(benchmark.SEVEN_B, {"flops": 0.5})
    cheapest = int(problem.smallest_costs().min())
    assert solve(replace(problem, limits=np.array([cheapest]))).cost == {"flops": cheapest}
    with pytest.raises(Infeasible, match=f"smallest possible is {cheapest}"):
        solve(replace(problem, limits=np.array([cheapest - 1])))


def test_the_benchmark_prints_both_solvers(benchmark, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["solver.py", "--baseline-seconds", "0.5", "--json"])
    benchmark.main()
    rows = json.loads(capsys.readouterr().out)
    assert [row["solver"] for row in rows] == ["planner", "CP-SAT"] * 2
    assert all(row["gap"] <= 1e-9 for row in rows if row["solver"] == "planner")


def test_the_benchmark_refuses_totals_that_disagree(benchmark, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["solver.py", "--baseline-seconds", "0.5"])
    monkeypatch.setattr(benchmark.Decoder, "group", lambda decoder, tokens: (tokens, 0))
    problem = benchmark.build(benchmark.SEVEN_B, {"flops": 0.65})
    answer = benchmark.proven(problem)
    monkeypatch.undo()
    with pytest.raises(SystemExit, match="recomputed cost"):
        benchmark.check(benchmark.SEVEN_B, problem, answer)

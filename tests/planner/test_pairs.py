"""Pairs in the exact solver: brute force, and the size that the project promises."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from problems import best_by_trying, paired_problem

from planner.ir.errors import InputError
from planner.solver import solve
from planner.solver.problem import (
    Choice,
    LayerChoices,
    Pair,
    Problem,
    SiteChoices,
    TokenOption,
)


@pytest.mark.parametrize("seed", range(300))
def test_optimum_is_that_of_brute_force(seed):
    problem = paired_problem(seed)
    solution = solve(problem)
    assert solution.status == "optimal"
    assert solution.utility == pytest.approx(best_by_trying(problem), abs=1e-9)
    assert solution.bound >= solution.utility


def deep_problem(seed, layers=32, strength=None):
    """As many layers, heads and MLP groups as a 7B model, all pairs of layers among them."""
    rng = np.random.default_rng(seed)
    choices = []
    for index in range(layers):
        depth = 0.3 + np.exp(-index / 4) + 0.5 * np.exp((index - layers) / 2)
        sites = tuple(
            SiteChoices(
                f"{kind}.{index}",
                depth * rng.gamma(0.6, 1.0, switches) / switches,
                price * np.arange(switches + 1, dtype=np.int64)[None, None],
            )
            for kind, switches, price in (("heads", 32, 131), ("mlp", 43, 197))
        )
        choices.append(LayerChoices(f"layer.{index}", 0.0, np.array([[7]]), sites))
    worth = [sum(float(s.utilities.sum()) for s in layer.sites) for layer in choices]
    pairs = tuple(
        Pair(
            f"layer.{a}",
            f"layer.{b}",
            float(
                rng.normal(0.1, 0.3) * min(worth[a], worth[b]) / (1 + abs(a - b))
                if strength is None
                else rng.normal(0.0, strength) * min(worth[a], worth[b])
            ),
        )
        for a, b in combinations(range(layers), 2)
    )
    whole = Problem(
        ("flops",),
        np.zeros(1, np.int64),
        (TokenOption((), 0.0, np.zeros(1, np.int64)),),
        tuple(choices),
        pairs,
    )
    return whole, int(whole.cost(Choice.everything(whole))[0])


@pytest.mark.parametrize("strength", [None, 0.3, 1.0])
@pytest.mark.parametrize("share", [0.9, 0.65, 0.4])
def test_all_pairs_of_32_layers_are_proven_and_alike_each_time(share, strength):
    """Pairs that fade with distance, and pairs that all count as much as layers do."""
    problem, most = deep_problem(0, strength=strength)
    assert len(problem.pairs) == 496
    problem = replace(problem, limits=np.array([int(most * share)]))
    solution = solve(problem, time_limit_seconds=60)
    assert solution.status == "optimal"
    assert solution == solve(problem, time_limit_seconds=60)
    additive = solve(replace(problem, pairs=()))
    assert problem.utility(additive.choice) <= solution.utility + 1e-9


def test_a_pair_keeps_one_of_two_layers():
    """Either may go alone; together they may not."""
    problem, _ = deep_problem(1, layers=3)
    pairs = (Pair("layer.0", "layer.1", 100.0),)
    cheap = replace(problem, pairs=(), limits=np.array([6000]))
    assert not any(solve(replace(cheap, limits=np.array([0]))).choice.layers_on)
    kept = solve(replace(cheap, pairs=pairs)).choice
    assert kept.layers_on[0] or kept.layers_on[1]


@pytest.mark.parametrize(("second", "loss"), [("layer.0", 1.0), ("x", 1.0), ("layer.1", np.inf)])
def test_pairs_that_say_nothing_are_refused(second, loss):
    problem, _ = deep_problem(1, layers=3)
    with pytest.raises(InputError):
        solve(replace(problem, pairs=(Pair("layer.0", second, loss),)))

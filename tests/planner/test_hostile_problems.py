"""Problems that nobody means: utilities out of all proportion, more switches than there is time."""

import time
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import best_by_enumeration, frontier_of, problems

from planner.ir.errors import InputError
from planner.solver import solve, solve_uniform
from planner.solver.problem import LayerChoices, Problem, SiteChoices, TokenOption
from planner.solver.reach import within_reach

HUGE = st.sampled_from([1e15, -1e15, 1e30, 1e100])


def _costs(*numbers):
    return np.array(numbers, dtype=np.int64)


def _with_layer(problem, utility, cost):
    """One more layer, which may be off."""
    shape = (len(problem.tokens), len(problem.metrics))
    layer = LayerChoices("huge", utility, np.full(shape, cost, dtype=np.int64))
    return replace(problem, layers=(*problem.layers, layer))


def _same(solution, other):
    return solution.utility == other.utility and solution.gap == pytest.approx(other.gap, abs=1e-9)


@settings(deadline=None, max_examples=60)
@given(problems(), HUGE)
def test_a_layer_that_cannot_fit_changes_nothing(problem, utility):
    best = best_by_enumeration(problem)
    if best is None or not problem.metrics:
        return
    solution = solve(_with_layer(problem, utility, 1 << 58))
    assert _same(solution, solve(problem))
    assert solution.status == "optimal"
    assert solution.utility == pytest.approx(best, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(problems(), HUGE)
def test_switches_that_cannot_fit_change_nothing(problem, utility):
    """A site whose second switch is out of reach, and whose best switch is worth nothing much."""
    if best_by_enumeration(problem) is None or not problem.metrics:
        return
    shape = (len(problem.tokens), len(problem.metrics), 1)
    costs = np.tile(_costs(0, 0, 1 << 58), shape)
    # The better of the two is taken: the huge one has to be the worse, or not there.
    values = np.array([1.0, -abs(utility)])
    site = SiteChoices("site.huge", values, costs)
    layer = LayerChoices("huge", 0.0, np.zeros(shape[:2], np.int64), (site,), optional=False)
    solution = solve(replace(problem, layers=(*problem.layers, layer)))
    assert solution.status == "optimal"
    assert solution.utility == pytest.approx(solve(problem).utility + 1.0, rel=1e-12, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(problems(), HUGE)
def test_a_token_option_that_cannot_fit_changes_nothing(problem, utility):
    if best_by_enumeration(problem) is None or not problem.metrics:
        return
    costs = np.full(len(problem.metrics), 1 << 58, dtype=np.int64)
    tokens = (*problem.tokens, TokenOption((99,), utility, costs))
    longer = replace(
        problem,
        tokens=tokens,
        layers=tuple(
            replace(
                layer,
                costs=np.concatenate([layer.costs, layer.costs[:1]]),
                sites=tuple(
                    replace(site, costs=np.concatenate([site.costs, site.costs[:1]]))
                    for site in layer.sites
                ),
            )
            for layer in problem.layers
        ),
    )
    assert _same(solve(longer), solve(problem))


@settings(deadline=None, max_examples=40)
@given(problems())
def test_what_is_within_reach_is_worth_the_same(problem):
    best = best_by_enumeration(problem)
    assert best_by_enumeration(within_reach(problem)) == pytest.approx(best)


def test_a_frontier_never_calls_optimal_what_its_scale_cannot_tell():
    site = SiteChoices("site", np.array([0.3, 0.2, 0.1]), np.arange(4, dtype=np.int64)[None, None])
    layers = (
        LayerChoices("layer.0", 0.5, np.ones((1, 1), np.int64), (site,)),
        LayerChoices("huge", 1e15, np.full((1, 1), 10**9, np.int64)),
    )
    tokens = (TokenOption((), 0.0, np.zeros(1, np.int64)),)
    problem = Problem(("flops",), _costs(3), tokens, layers)
    best = solve(problem)
    assert (best.status, best.utility) == ("optimal", 1.0)
    found = frontier_of(problem, "flops")(3)
    assert found.bound >= best.utility
    assert found.status == "feasible" or found.utility == best.utility


@pytest.mark.parametrize("limit", [float("nan"), -1.0, -float("inf")])
def test_a_time_limit_that_is_none_is_refused(limit):
    problem = wide(2, 4, 1)
    with pytest.raises(InputError, match="time limit"):
        solve(problem, time_limit_seconds=limit)
    with pytest.raises(InputError, match="time limit"):
        solve_uniform(problem, time_limit_seconds=limit)


def wide(layers, switches, options, seed=0):
    """Layers with one site of many switches, no two worth the same, for half of all cost."""
    draw = np.random.default_rng(seed)
    share = np.linspace(1, 0.4, options)
    made = []
    for layer in range(layers):
        steps = np.stack([np.arange(switches + 1) * int(1e6 * s) for s in share])
        site = SiteChoices(f"mlp.{layer}", draw.random(switches), steps[:, None].astype(np.int64))
        own = (share * 1e8).astype(np.int64)[:, None]
        made.append(LayerChoices(f"layer.{layer}", 0.0, own, (site,)))
    tokens = tuple(TokenOption((n,), float(n), _costs(0)) for n in range(options, 0, -1))
    return Problem(("flops",), _costs(layers * switches * 500_000), tokens, tuple(made))


@pytest.mark.parametrize("limit", [1e-3, 0.5])
def test_the_time_limit_is_kept_with_a_switch_for_every_neuron(limit):
    problem = wide(32, 11_008, 4)
    # Of processor time: what else the machine does is not the solver's fault.
    started = time.process_time()
    solution = solve(problem, time_limit_seconds=limit)
    assert time.process_time() - started < limit + 1.0
    assert problem.is_feasible(solution.choice)
    assert 0 <= solution.gap < 0.5


def test_the_time_limit_is_kept_where_prices_tie():
    """Equal switches: the linear program ends early, and what it leaves open is everything."""
    problem = wide(16, 4096, 2)
    equal = replace(
        problem,
        layers=tuple(
            replace(
                layer,
                sites=tuple(
                    replace(site, utilities=np.full(site.switches, 0.1)) for site in layer.sites
                ),
            )
            for layer in problem.layers
        ),
    )
    started = time.process_time()
    solution = solve(equal, time_limit_seconds=0.2)
    assert time.process_time() - started < 1.2
    assert problem.is_feasible(solution.choice)


def test_more_sets_of_equal_counts_than_can_be_gone_through_are_refused():
    with pytest.raises(InputError, match="fewer groups"):
        solve_uniform(wide(2, 30_000, 1))

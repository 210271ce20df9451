"""Plans whose token stages score by attention leave a layer on that attends, and are the best."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from families import FAMILIES

from planner.ir.lowering import lower_model
from planner.models.running.skipping import obeying
from planner.planning.compiler import plan_graph, pose, written
from planner.planning.prompt_costs import PromptCosts
from planner.planning.request import Request
from planner.planning.scored_stages import solve_scored
from planner.solver import Infeasible, solve

SELECTORS = (
    "fastv:k=1,r=0.5",
    "fastv:k=2,r=0.75",
    "dart:k=1,keep=4",
    "sparsevlm:after=0/1,keep=9/4",
    "pyramiddrop:k=1/2,ratio=0.5/0.25",
)


@functools.cache
def family():
    made = FAMILIES["llava"]()
    return made, lower_model(made.model, "llava")


def asked(selector, budget, switches="layers,heads"):
    return Request(
        "llava",
        budget,
        switches=switches,
        tokens=selector,
        utilities="prior",
        text_tokens=6,
        new_tokens=0,
        scope="llm",
    )


def scores(plan, graph, behind):
    """Whether every stage of a plan has attention on its side."""
    on = {
        site.layer
        for site in graph.sites_of("heads")
        if site.layer not in plan.layers_off and plan.kept(site).count
    }
    return all(any((n >= stage.layer) == behind for n in on) for stage in plan.tokens)


def smallest(graph, selector):
    """The least budget with any plan at all, in permille."""
    for permille in range(1, 1000, 20):
        try:
            _, _, problem = pose(graph, asked(selector, permille / 1000))
        except Infeasible:
            continue
        if (problem.smallest_costs() <= problem.limits).all(axis=1).any():
            return permille
    raise AssertionError


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("switches", ["layers", "layers,heads"])
def test_low_budgets_have_plans_that_run(selector, switches):
    made, graph = family()
    inputs, ran = made.inputs(), 0
    for permille in range(smallest(graph, selector), 700, 40):
        try:
            plan = plan_graph(graph, asked(selector, permille / 1000, switches)).plan
        except Infeasible:
            continue
        with torch.no_grad(), obeying(made.model, graph, plan):
            made.model(**inputs)
        ran += 1
    assert ran


@pytest.mark.parametrize("selector", SELECTORS)
def test_no_choice_that_could_run_is_better(selector):
    """Against every choice there is; many switches seem to do harm."""
    _, graph = family()
    behind, differ, first = selector.startswith("pyramiddrop"), 0, smallest(graph, selector)
    for seed in range(10):
        random = np.random.default_rng(seed)
        request = asked(selector, (first + 20 * seed) / 1000)
        pricing, utilities, problem = pose(graph, request)
        problem = problem.with_utilities(random.uniform(-0.3, 0.2, problem.switches))
        best = free = -math.inf
        flags = itertools.product((False, True), repeat=problem.switches)
        for row, option in itertools.product(flags, range(len(problem.tokens))):
            choice = problem.choice_of(row, option)
            if not problem.is_feasible(choice):
                continue
            keep, worth = pricing.token_options[option], problem.utility(choice)
            plan = written(pricing, choice, keep, request.limits(), utilities)
            free = max(free, worth)
            if scores(plan, pricing.graph, behind):
                best = max(best, worth)
        differ += best < free - 1e-9
        if math.isinf(best):
            with pytest.raises(Infeasible, match="a layer that attends"):
                solve_scored(pricing, problem, solve)
            continue
        found = solve_scored(pricing, problem, solve)
        keep = pricing.token_options[found.choice.token_option]
        plan = written(pricing, found.choice, keep, request.limits(), utilities)
        assert scores(plan, pricing.graph, behind)
        assert found.utility == pytest.approx(best, rel=1e-9)
        assert found.bound >= best - 1e-9
        assert found.status == "optimal"
    assert differ


@pytest.mark.parametrize("selector", SELECTORS)
def test_plans_for_the_prompt_at_hand_run_as_well(selector):
    """They come from a frontier, which knows nothing of stages."""
    _, graph = family()
    pricing, utilities, _ = pose(graph, asked(selector, 1.0))
    costs, behind, first = PromptCosts(pricing, utilities), "pyramid" in selector, None
    for permille in range(smallest(graph, selector), 400, 15):
        budget = asked(selector, permille / 1000).limits()
        here = costs.on(pricing.workload)
        try:
            plan = here.plan(budget)
        except Infeasible:
            assert first is None
            continue
        first = first or permille
        assert scores(plan, pricing.graph, behind)
        assert here.allows(plan, budget)
    assert first

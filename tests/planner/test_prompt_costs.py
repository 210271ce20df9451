"""Costs on any prompt by a few terms: what `Pricing` says of that prompt, and plans that fit it."""

import functools
from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.ir.cost import Workload
from planner.ir.lowering import lower_config, lower_model
from planner.models.checking.small_config import small_default
from planner.planning.budgets import Budget
from planner.planning.compiler import pose
from planner.planning.figures import check_figures
from planner.planning.prompt_costs import WEIGHED, PromptCosts
from planner.planning.request import Request
from planner.planning.scored_stages import solve_scored
from planner.solver import Infeasible, solve
from planner.solver.problem import Choice

# Sliding windows; a selector with rows of its own; a cache that evicts; half of the model alone;
# recurrences in chunks, some beside attention.
REQUESTS = [
    ("gemma3", {}),
    ("llava", {}),
    ("llava", {"tokens": "sparsevlm:after=0/2,keep=9/3"}),
    ("llava", {"tokens": "prumerge+:ratio=0.25"}),
    ("llava", {"kv": "h2o:heavy=0.2,recent=0.2"}),
    ("llava", {"scope": "llm", "switches": "tokens,heads"}),
    ("qwen3", {}),
    ("mamba2", {}),
    ("qwen3_5_text", {}),
]


WORDS = ("qwen3", "mamba2", "qwen3_5_text")


@functools.cache
def graph_of(name):
    if name not in FAMILIES:
        return lower_config(small_default(name), name).graph
    return lower_model(FAMILIES[name]().model, name)


@functools.cache
def costs_of(number):
    name, options = REQUESTS[number]
    pricing, utilities, _ = pose(
        graph_of(name), Request(name, 1.0, utilities="prior", mlp_groups=8, **options)
    )
    return PromptCosts(pricing, utilities), pricing, utilities


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    number=st.integers(0, len(REQUESTS) - 1),
    images=st.integers(0, 3),
    text=st.integers(1, 300),
    new=st.integers(0, 80),
    batch=st.integers(1, 3),
    logits=st.integers(0, 9),
    encoder=st.one_of(st.none(), st.integers(0, 10**8)),
    budget=st.sampled_from([1.0, 0.8, ["flops=0.9", "kv=0.7"], "kv=3kB"]),
)
def test_terms_are_the_costs_and_plans_keep_to_budgets(
    number, images, text, new, batch, logits, encoder, budget
):
    costs, pricing, utilities = costs_of(number)
    images = 0 if REQUESTS[number][0] in WORDS else 16 * images
    load = replace(
        pricing.workload, image_tokens=images, text_tokens=text, new_tokens=new, batch=batch,
        logits=logits, encoder_flops=encoder,
    )  # fmt: skip
    on_prompt, budget = costs.on(load), Budget.of(budget)
    at = on_prompt.pricing
    assert on_prompt.base == {metric: at.base[metric] for metric in WEIGHED}
    try:
        plan = on_prompt.plan(budget)
    except Infeasible:
        with pytest.raises(Infeasible):
            solve_scored(at, at.problem(budget, utilities), solve)
        return
    known = at.cost_of(plan)
    assert {m: plan.cost[m]["plan"] for m in WEIGHED} == {m: known[m] for m in WEIGHED}
    for metric, limit in at.limits(budget).items():
        assert known[metric] <= limit
    assert on_prompt.allows(plan, budget)
    assert plan.solver["utility"] <= plan.solver["bound"]
    # What is stated in a file is held against what is computed again.
    check_figures(plan, pricing.graph)


def test_a_plan_for_another_prompt_is_as_good_as_the_frontier_says():
    costs, pricing, utilities = costs_of(1)
    for text in (8, 64, 400):
        load = replace(pricing.workload, text_tokens=text)
        plan = costs.on(load).plan(Budget.of(0.8))
        best = solve(costs.on(load).pricing.problem(Budget.of(0.8), utilities))
        assert plan.solver["utility"] <= best.utility + 1e-12 <= plan.solver["bound"] + 2e-12
        assert plan.solver["utility"] >= 0.95 * best.utility


def test_a_workload_is_stated_whole():
    graph = graph_of("llava")
    load = Workload.default(graph, 16, 9, 3, 2)
    for stated in (load, replace(load, logits=0), replace(load, encoder_flops=7)):
        assert Workload.stated(graph, stated.facts) == stated
    assert load.facts.keys() == {"image_tokens", "text_tokens", "new_tokens", "batch"}
    assert Workload.stated(graph, {"batch": 1}) is None


@functools.cache
def paired_costs():
    """Costs with worth in pairs of layers, of heads with their MLP, and of layers with tokens."""
    costs, pricing, utilities = costs_of(1)
    rng = np.random.default_rng(3)
    count = pricing.graph.layers
    sizes = np.array([utilities.of_layer(pricing.graph.sites_at(n)) for n in range(count)])
    losses = {
        (f"layer.{a}", f"layer.{b}"): rng.normal(0.2, 0.5) * float(min(sizes[a], sizes[b]))
        for a, b in combinations(range(count), 2)
    }
    losses |= {(f"heads.{n}", f"mlp.{n}"): 0.1 * float(sizes[n]) for n in range(count)}
    paired = replace(
        utilities,
        pairs=losses,
        token_fractions=np.array([0.25, 0.5]),
        token_losses=np.outer([0.3, 0.1], sizes),
    )
    return PromptCosts(pricing, paired), costs, paired


@settings(max_examples=40, deadline=None)
@given(
    images=st.integers(0, 3),
    text=st.integers(1, 300),
    batch=st.integers(1, 3),
    budget=st.sampled_from([0.7, 0.85, ["flops=0.9", "kv=0.6"], "kv=0.5"]),
)
def test_plans_count_pairs_and_are_no_worse_for_it(images, text, batch, budget):
    costs, alone, utilities = paired_costs()
    load = replace(costs.pricing.workload, image_tokens=16 * images, text_tokens=text, batch=batch)
    on_prompt, budget = costs.on(load), Budget.of(budget)
    try:
        plan, other = on_prompt.plan(budget), alone.on(load).plan(budget)
    except Infeasible:
        return
    assert on_prompt.allows(plan, budget)
    problem = on_prompt.pricing.problem(budget, utilities)
    worth, without = (problem.utility(choice_of(on_prompt, each)) for each in (plan, other))
    assert worth == pytest.approx(plan.solver["utility"], abs=1e-9)
    assert worth >= without - 1e-9
    best = solve(problem)
    assert worth <= best.utility + 1e-9 <= plan.solver["bound"] + 2e-9


def choice_of(on_prompt, plan):
    """A plan as a choice of the problem on its prompt."""
    pricing = on_prompt.pricing
    running = [n not in plan.layers_off for n in range(pricing.graph.layers)]
    sites = [s for s in pricing.graph.sites if s.kind != "layer"]
    kept = {site.name: plan.kept(site).switches for site in sites}
    option = pricing.token_options.index(pricing.option_of(plan))
    return Choice(option, tuple(running), kept)


def test_what_is_to_stay_whole_stays_whole_on_every_prompt():
    _, pricing, utilities = costs_of(1)
    costs = PromptCosts(pricing, utilities, keep="layer.1,mlp.2")
    for text, budget in ((8, 0.8), (300, 0.7), (90, ["flops=0.8", "kv=0.6"])):
        plan = costs.on(replace(pricing.workload, text_tokens=text)).plan(Budget.of(budget))
        assert 1 not in plan.layers_off
        whole = [pricing.graph.sites_by_name[name] for name in ("heads.1", "mlp.1", "mlp.2")]
        assert all(plan.kept(site).everything for site in whole)

"""Costs on any prompt by a few terms: what `Pricing` says of that prompt, and plans that fit it."""

import functools
from dataclasses import replace

import pytest
from families import FAMILIES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from planner.ir.cost import Workload
from planner.ir.lowering import lower_config, lower_model
from planner.models.checking.small_config import small_default
from planner.plan import dump_plan, load_plan
from planner.planning.budgets import Budget
from planner.planning.compiler import pose
from planner.planning.figures import check_figures
from planner.planning.prompt_costs import WEIGHED, PromptCosts
from planner.planning.request import Request
from planner.solver import Infeasible, solve

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
    return PromptCosts(pricing, utilities, "flops"), pricing, utilities


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
            solve(at.problem(budget, utilities))
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
        assert plan.solver["utility"] <= best.utility <= plan.solver["bound"]
        assert plan.solver["utility"] >= 0.95 * best.utility


def test_a_workload_is_stated_whole():
    graph = graph_of("llava")
    load = Workload.default(graph, 16, 9, 3, 2)
    for stated in (load, replace(load, logits=0), replace(load, encoder_flops=7)):
        assert Workload.stated(graph, stated.facts) == stated
    assert load.facts.keys() == {"image_tokens", "text_tokens", "new_tokens", "batch"}
    assert Workload.stated(graph, {"batch": 1}) is None


def test_plans_of_other_prompts_say_that_pairs_are_left_out(tmp_path):
    costs, _, utilities = costs_of(1)
    paired = replace(utilities, pairs={("layer.1", "layer.2"): 0.5})
    load = Workload(16, 40, 8)
    for worth, said in ((utilities, None), (paired, "left out")):
        plan = PromptCosts(costs.pricing, worth, "flops").on(load).plan(Budget.of(0.8))
        assert plan.solver.get("pairs") == said
        path = tmp_path / "plan.yaml"
        path.write_text(dump_plan(plan))
        assert load_plan(path) == plan

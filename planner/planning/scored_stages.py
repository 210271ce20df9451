"""Token stages that score by attention need a layer that attends, before them or behind.

A plan without one could not run. That one of several layers stays is no limit on a sum, so where
the best choice leaves none, the problem is solved once for each layer that could stay, and once for
no choice of tokens there; the best of the answers is the best of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import numpy as np

from planner.plan import Plan
from planner.planning.pricing import Pricing
from planner.planning.selectors import Needs, scores_by_attention
from planner.solver import Infeasible, Solution
from planner.solver.problem import Choice, Problem
from planner.solver.solution import best_of

Solve = Callable[[Problem], Solution]


def solve_scored(pricing: Pricing, problem: Problem, solve: Solve) -> Solution:
    """The best choice in which every token stage has an attention to score by.

    `solve`: what finds the best choice of a problem. Infeasible where there is none.
    """
    solution = solve(problem)
    option = pricing.token_options[solution.choice.token_option]
    place = unscored_stage(pricing, solution.choice, option)
    if place is None:
        return solution
    found, refused = [], Infeasible("the limits cannot be met")
    for alternative in _alternatives(pricing, problem, place):
        try:
            found.append(solve_scored(pricing, alternative, solve))
        except Infeasible as why:
            refused = why
    if not found:
        stage = pricing.stages[place]
        raise Infeasible(
            f"{refused}, with a layer that attends for {pricing.switches.token_selector} at layer "
            f"{stage}"
        )
    return best_of(problem, found)


def unscored_stage(pricing: Pricing, choice: Choice, option: Sequence[int]) -> int | None:
    """The place of the first token stage that has nothing to score by, None where all have.

    `option`: image tokens left behind each stage; () where none is dropped.
    """
    # A choice of counted switches says nothing of single layers; see `check_scored`.
    if pricing.switches.counting:
        return None
    attending = {
        site.layer
        for site in pricing.graph.sites_of("heads")
        if choice.layers_on[site.layer] and choice.kept.get(site.name, True)
    }
    before = pricing.workload.image_tokens
    for place, keep in enumerate(option):
        if keep < before and _lacks_scores(pricing, pricing.stages[place], attending):
            return place
        before = keep
    return None


def check_scored(plan: Plan, pricing: Pricing) -> None:
    """Raise Infeasible where a token stage of a plan has nothing to score by."""
    attending = {
        site.layer
        for site in pricing.graph.sites_of("heads")
        if site.layer not in plan.layers_off and plan.kept(site).count
    }
    for stage in plan.tokens:
        if _lacks_scores(pricing, stage.layer, attending):
            raise Infeasible(
                f"{stage.selector} at layer {stage.layer} scores tokens by the attention of other "
                "layers, and within these limits none of them stays on"
            )


def _lacks_scores(pricing: Pricing, stage: int, attending: set[int]) -> bool:
    near = _near(pricing, stage)
    return near is not None and attending.isdisjoint(near)


def _near(pricing: Pricing, stage: int) -> range | None:
    """Layers whose attention a stage can score by; None where it scores by none."""
    switches, layers = pricing.switches, pricing.graph.layers
    if switches.selector is None:
        return range(stage) if scores_by_attention(switches.token_selector) else None
    needs = switches.selector.at_layer(stage).needs
    if Needs.NEXT_QUERY_KEY in needs:
        return range(stage, layers)
    return range(stage) if Needs.QUERY_KEY in needs else None


def _alternatives(pricing: Pricing, problem: Problem, place: int) -> Iterator[Problem]:
    heads = {site.layer: site.name for site in pricing.graph.sites_of("heads")}
    for layer in _near(pricing, pricing.stages[place]) or ():
        if layer in heads:
            yield _attending(problem, layer, heads[layer])
    beyond = np.maximum(problem.limits, 0) + 1
    tokens = [
        token if _drops_nothing(pricing, option, place) else replace(token, costs=beyond)
        for token, option in zip(problem.tokens, pricing.token_options, strict=True)
    ]
    yield replace(problem, tokens=tuple(tokens))


def _attending(problem: Problem, layer: int, heads: str) -> Problem:
    """The problem with a layer on, and a head of it."""
    one = problem.layers[layer]
    sites = tuple(
        replace(site, minimum=max(1, site.minimum)) if site.name == heads else site
        for site in one.sites
    )
    layers = [*problem.layers]
    layers[layer] = replace(one, sites=sites, optional=False)
    return replace(problem, layers=tuple(layers))


def _drops_nothing(pricing: Pricing, option: tuple[int, ...], place: int) -> bool:
    """Whether a token option leaves a stage out; () leaves out all."""
    before = (pricing.workload.image_tokens, *option)
    return not option or before[place + 1] >= before[place]

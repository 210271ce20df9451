"""Compile: from a model's config and a budget to a proven Plan."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from planner import __version__
from planner.ir.cost.device_table import Device, device
from planner.ir.cost.measured_device import MeasuredDevice
from planner.ir.errors import InputError, PlannerError
from planner.ir.graph import Graph
from planner.ir.passes import NarrowPatches, NarrowTokens, Pass, Specialise, run
from planner.ir.structure import tiles
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.catalog import Source, find_model, utilities_beside
from planner.planning.config_sizes import head_counts
from planner.planning.graph_cache import lowered_graph
from planner.planning.pricing import COUNTED, Pricing, compared
from planner.planning.request import Request
from planner.planning.scored_stages import Solve, check_scored, solve_scored
from planner.planning.selectors import (
    VisionSelector,
    parse_kv_policy,
    patch_stages,
    scores_by_attention,
)
from planner.planning.selectors.eviction import check_beside, check_policy
from planner.planning.switches import SwitchSet, with_switches
from planner.planning.unit_counting import faithful_problem, unfold
from planner.planning.utilities import Utilities, load_utilities, prior, uniform
from planner.progress import Say
from planner.solver import Solution, solve, solve_uniform
from planner.solver.problem import Choice, Problem

DEFAULT_DEVICE = "a100-40g"


@dataclass(frozen=True)
class Compiled:
    """A plan and everything that led to it."""

    plan: Plan
    graph: Graph
    pricing: Pricing
    problem: Problem
    solution: Solution
    notes: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)
    from_cache: bool = False


def find_device(name: str | None) -> Device:
    """A device as `planner devices` lists it, or that of a file of planner calibrate, which ends in
    ``.json``; None is the default. InputError where there is none."""
    name = name or DEFAULT_DEVICE
    if not name.endswith(".json"):
        return device(name)
    from planner.planning.device_file import read_device

    return read_device(Path(name))


def compile_plan(request: Request, progress: Say = lambda stage: None) -> Compiled:
    """Find, lower, price and solve.

    InputError for anything wrong with the request, limits that cannot be met among them.
    """
    seconds: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        progress(name)
        started = time.perf_counter()
        yield
        seconds[name] = time.perf_counter() - started

    request.limits()
    find_device(request.device)
    SwitchSet.parse(request.switches)
    with stage("find"):
        source = find_model(request.model, request.trust_remote_code)
    with stage("lower"):
        graph, notes, cached = lowered_graph(source)
    counts = _plain_counts(source, graph) if request.uniform else None
    request = replace(request, utilities=_shipped(request, source))
    compiled = plan_graph(graph, request, stage, counts)
    notes = (*_unmeasured(request, compiled.pricing), *notes)
    return replace(compiled, notes=notes, seconds=seconds, from_cache=cached)


def _unmeasured(request: Request, pricing: Pricing) -> Iterator[str]:
    """That seconds are those of any model, where they are limited and could be this model's own."""
    chip, graph = pricing.device, pricing.graph
    is_limited = any(limit.metric == "latency" for limit in request.limits().limits)
    if is_limited and isinstance(chip, MeasuredDevice) and not chip.knows(graph.dtype_bytes):
        yield (
            f"'{chip.name}' knows no passes of this model: planner calibrate -o {chip.name} "
            "--model ... measures them, and deadlines are kept more closely"
        )


def plan_graph(
    graph: Graph,
    request: Request,
    stage: Callable[[str], AbstractContextManager[Any]] = nullcontext,
    counts: Mapping[str, Collection[int]] | None = None,
) -> Compiled:
    """Price and solve a Graph that is at hand; its name in the request does not matter.

    `stage` is entered around each stage, with its name; `counts` are as for `solve_uniform`.
    InputError where the request does not fit the model, or its limits cannot be met.
    """
    with stage("price"):
        pricing, utilities, problem = pose(graph, request)
    with stage("solve"):
        limit = request.time_limit_seconds
        search: Solve = partial(solve, time_limit_seconds=limit)
        if request.uniform:
            problem = problem.additive()
            search = partial(solve_uniform, counts=counts, time_limit_seconds=limit)
        solution = solve_scored(pricing, problem, search)
    with stage("check"):
        plan = _plan(pricing, problem, solution, request.limits(), utilities)
        check_scored(plan, pricing)
    return Compiled(plan, pricing.graph, pricing, problem, solution)


def pose(graph: Graph, request: Request) -> tuple[Pricing, Utilities, Problem]:
    """What everything costs and is worth, and the problem that the budget makes of it; InputError
    where the request does not fit the model."""
    budget, switches = request.limits(), SwitchSet.parse(request.switches)
    graph = with_switches(graph, request.mlp_groups, switches.like_heads)
    if not switches.usable(graph) and switches.axes != ("tokens",):
        raise InputError(
            f"'{graph.name}' has nothing to switch on the axes {', '.join(switches.axes)}"
        )
    load = request.workload(graph)
    if request.tokens is not None:
        switches = switches.with_selector(
            request.tokens, load.image_tokens, load.image_tokens_per_run, tiles(graph)
        )
        if isinstance(switches.selector, VisionSelector):
            switches.selector.check_in(graph)
        last = max(switches.token_layers)
        if last >= graph.layers:
            raise InputError(
                f"{request.tokens} drops tokens before decoder layer {last}, counted from 0, "
                f"and '{graph.name}' has {graph.layers} layers"
            )
    if request.kv is not None:
        switches = switches.with_kv_policy(request.kv)
        policy = parse_kv_policy(request.kv)
        check_policy(policy, graph)
        if request.tokens is not None and switches.selector is not None:
            check_beside(policy, switches.selector, request.tokens)
    scope = request.scope or ("llm" if switches.counting else "model")
    pricing = Pricing(graph, load, switches, find_device(request.device).on(graph), scope)
    utilities = _utilities(request.utilities, graph, pricing)
    if switches.counting:
        return pricing, utilities, faithful_problem(graph, budget, utilities, switches.counting)
    return pricing, utilities, keeping_whole(pricing.problem(budget, utilities), request.keep)


def _plain_counts(source: Source, graph: Graph) -> dict[str, Collection[int]]:
    """Numbers of heads that a plain checkpoint can have, by kind of site."""
    groups = {site.lanes for site in graph.sites_of("heads")}
    if len(groups) != 1:
        return {}
    return {"heads": head_counts(source.load_config(), groups.pop())}


def _shipped(request: Request, source: Source) -> str | Path:
    """Utilities for a request that names none: the file beside the weights, or the prior."""
    switches = SwitchSet.parse(request.switches)
    if request.utilities != "auto" or request.mlp_groups or switches.counting:
        return request.utilities
    return utilities_beside(source.folder) or request.utilities


def keeping_whole(problem: Problem, names: str | Sequence[str]) -> Problem:
    """The problem with some layers, heads or MLPs left whole, such as ``layer.0,heads.3``;
    InputError where there is nothing of that name to switch."""
    if isinstance(names, str):
        names = [name.strip() for name in names.split(",") if name.strip()]
    if not names:
        return problem
    wanted, layers = set(names), []
    known = {site.name for site in problem.sites} | {layer.name for layer in problem.layers}
    if unknown := sorted(wanted - known):
        raise InputError(
            f"cannot keep '{unknown[0]}' whole: name what can be switched, such as layer.0, "
            "heads.3 or mlp.3"
        )
    for layer in problem.layers:
        whole = {s.name for s in layer.sites if layer.name in wanted or s.name in wanted}
        sites = tuple(
            replace(site, minimum=site.switches) if site.name in whole else site
            for site in layer.sites
        )
        optional = layer.optional and layer.name not in wanted and not whole
        layers.append(replace(layer, sites=sites, optional=optional))
    return replace(problem, layers=tuple(layers))


def _utilities(name: str | Path, graph: Graph, pricing: Pricing) -> Utilities:
    if name in ("auto", "prior"):
        return prior(graph, pricing.work())
    if name == "uniform":
        return uniform(graph, pricing.work())
    if name == "magnitude":
        raise InputError("utilities 'magnitude' are of weights, which nobody loads here")
    return load_utilities(Path(name), graph)


def _plan(
    pricing: Pricing, problem: Problem, solution: Solution, budget: Budget, utilities: Utilities
) -> Plan:
    """Write a solution down as a Plan, and price the plan afresh."""
    choice, switches = solution.choice, pricing.switches
    keep = pricing.token_options[choice.token_option]
    if switches.counting:
        choice = unfold(choice, pricing.graph, utilities, switches.counting)
    plan = written(pricing, choice, keep, budget, utilities)
    costs, base = pricing.cost_of(plan), pricing.base
    if switches.counting:
        limit = int(problem.limits[0])
        used = {"units": solution.cost["units"] / limit if limit else 1.0}
    else:
        used = _utilisation(costs, pricing.limits(budget))
    return replace(plan, cost=compared(costs, base, base), utilisation=used, solver=solution.facts)


def written(
    pricing: Pricing, choice: Choice, keep: Sequence[int], budget: Budget, utilities: Utilities
) -> Plan:
    """A choice as a Plan that says what it was made for, but not what it costs.

    `keep`: image tokens left behind each token stage; () where none is dropped.
    """
    graph, switches, load = pricing.graph, pricing.switches, pricing.workload
    stages: list[TokenStage] = []
    for layer, count in zip(pricing.stages, keep, strict=True):
        before = stages[-1].keep if stages else load.image_tokens
        if count < before:
            stages.append(TokenStage(layer, count, load.image_tokens, switches.token_selector))
    plan = Plan.of(
        graph,
        layers_off=tuple(i for i, on in enumerate(choice.layers_on) if not on),
        tokens=tuple(stages),
        kv="" if switches.kv is None else str(switches.kv),
        budget=budget.describe(),
        provenance={
            "planner": __version__,
            "switches": switches.name,
            "utilities": utilities.name,
            **({"recover": utilities.recover} if utilities.recover else {}),
            "scope": pricing.scope,
            "device": pricing.device.name,
            **load.facts,
        },
    )
    return plan.keeping((s, choice.kept[s.name]) for s in graph.sites if s.name in choice.kept)


def _utilisation(costs: Mapping[str, float], limits: Mapping[str, int]) -> dict[str, float]:
    """What a plan uses of its limits; PlannerError: more than all, by costs that are not the
    solver's."""
    for metric, limit in limits.items():
        if round(costs[metric] * COUNTED[metric]) > limit:
            raise PlannerError(f"the plan exceeds its {metric} limit: this is a bug in planner")
    return {m: costs[m] * COUNTED[m] / max(limit, 1) for m, limit in limits.items()}


def specialised(
    graph: Graph, plan: Plan, print_between: Callable[[str, Graph], None] | None = None
) -> Graph:
    """The graph as it runs under a plan: layers, heads, groups and tokens that are off are gone.

    What the stock model computes and never reads (CLIP's last layer in LLaVA) still runs, so dead
    operators stay.
    """
    passes: list[Pass] = [Specialise(plan), narrowing(plan.tokens)]
    if patches := patch_stages(plan.tokens, graph):
        passes.insert(1, NarrowPatches(patches))
    return run(graph, passes, print_between)


def narrowing(stages: tuple[TokenStage, ...]) -> NarrowTokens:
    """The pass that drops tokens at these stages."""
    scored = frozenset(s.layer for s in stages if scores_by_attention(s.selector))
    return NarrowTokens(stages, scored)

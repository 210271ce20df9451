"""How long the plan for a prompt of a new size takes, and how near the best one it is.

    python benchmarks/prompt_plans.py [--model llava-7b] [--prompts 200] [--seed 0] [--json]

Prompts of up to four images and 400 words, in batches of up to four, under limits on FLOPs, on KV
bytes and on both, with FastV, and with losses in pairs (here: drawn at random, for all pairs of
layers). Milliseconds are of processor time. Every plan is priced again, operator by operator, and
nothing is reported if one breaks its budget. The first plans are held against the exact solver's.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from planner.cli.console import print_json, print_records
from planner.ir.cost import Workload
from planner.ir.graph import Graph
from planner.models.running.planning import Planning
from planner.plan import Plan
from planner.planning.budgets import Budget
from planner.planning.catalog import find_model
from planner.planning.compiler import pose
from planner.planning.graph_cache import lowered_graph
from planner.planning.pricing import Pricing
from planner.planning.prompt_costs import PromptCosts
from planner.planning.request import Request
from planner.planning.utilities import Utilities, save_utilities
from planner.solver import Infeasible, solve
from planner.solver.problem import Choice

# What plans are made under: (budget, further options of the request).
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "FLOPs .5": (0.5, {}),
    "KV .5": ("kv=0.5", {}),
    "FLOPs .5, KV .4": (["flops=0.5", "kv=0.4"], {}),
    "FLOPs .5, KV .7": (["flops=0.5", "kv=0.7"], {}),
    "FLOPs .5, fastv": (0.5, {"tokens": "fastv:k=2,r=0.5"}),
    "FLOPs .5, pairs": (0.5, {"utilities": "pairs"}),
    "FLOPs .5, KV .4, pairs": (["flops=0.5", "kv=0.4"], {"utilities": "pairs"}),
}
WARM_UP, PROVEN = 5, 5
COLUMNS = {
    "limits": "{limits}",
    "prompts": "{prompts}",
    "built, s": "{build_seconds:.2f}",
    "median, ms": "{median_ms:.2f}",
    "p95, ms": "{p95_ms:.2f}",
    "stated gap": "{stated_gap:.2%}",
    "gap": "{gap:.2%}",
}


@dataclass(frozen=True)
class Row:
    """What plans under one budget took; gaps are largest ones."""

    limits: str
    prompts: int
    build_seconds: float  # of the frontier, once
    median_ms: float
    p95_ms: float
    stated_gap: float  # by the plans themselves
    gap: float  # from the exact solver's, where it was asked


def prompts_of(pricing: Pricing, count: int, seed: int) -> Iterator[Workload]:
    """Prompts, no two of one size, whose encoders have been counted."""
    rng = np.random.default_rng(seed)
    load = pricing.workload
    one_image = int(pricing.encoder[0])
    for text in rng.choice(np.arange(8, 400), count, replace=False).tolist():
        images = int(rng.integers(0, 5))
        yield replace(
            load,
            image_tokens=images * load.image_tokens_per_run,
            text_tokens=text,
            batch=(batch := int(rng.integers(1, 5))),
            encoder_flops=batch * images * one_image,
        )


def with_pairs(graph: Graph, folder: Path, seed: int) -> Path:
    """A file of the prior with losses of all pairs of layers, which fade with distance."""
    pricing, known, _ = pose(graph, Request(graph.name, utilities="prior"))
    rng = np.random.default_rng(seed)
    worth = [
        sum(float(known.of_site(s).sum()) for s in pricing.graph.sites_at(n) if s.kind != "layer")
        for n in range(graph.layers)
    ]
    losses = {
        (f"layer.{a}", f"layer.{b}"): float(
            rng.normal(0.1, 0.3) * min(worth[a], worth[b]) / (b - a)
        )
        for a, b in combinations(range(graph.layers), 2)
    }
    path = folder / "pairs.npz"
    save_utilities(path, replace(known, pairs=losses), pricing.graph)
    return path


def gap_from_best(plan: Plan, pricing: Pricing, budget: Budget, utilities: Utilities) -> float:
    """How far a plan is below the exact solver's, as a share of what that is worth."""
    problem = pricing.problem(budget, utilities)
    running = tuple(layer not in plan.layers_off for layer in range(pricing.graph.layers))
    sites = pricing.graph.sites_by_name
    kept = {site.name: plan.kept(sites[site.name]).switches for site in problem.sites}
    option = pricing.token_options.index(pricing.option_of(plan))
    made = problem.utility(Choice(option, running, kept))
    best = solve(problem, time_limit_seconds=60).utility
    return max(0.0, best - made) / abs(best)


def measure(graph: Graph, name: str, count: int, seed: int, paired: Path) -> Row:
    """Plan for prompts under one of `CASES`; SystemExit where a plan breaks its budget."""
    asked, options = CASES[name]
    options = {"utilities": "prior"} | options
    if options["utilities"] == "pairs":
        options["utilities"] = paired
    request, budget = Request(graph.name, budget=asked, **options), Budget.of(asked)
    pricing, utilities, _ = pose(graph, request)
    planning = Planning(graph, request)
    planning.plan(budget)
    began = time.process_time()
    costs = PromptCosts(pricing, utilities)
    build_seconds = time.process_time() - began
    seconds: list[float] = []
    stated: list[float] = []
    gaps: list[float] = []
    for number, prompt in enumerate(prompts_of(pricing, count + WARM_UP, seed)):
        began = time.process_time()
        try:
            plan = planning.plan_on(budget, prompt)
        except Infeasible:
            continue
        took = time.process_time() - began
        here = costs.on(prompt).pricing
        spent = here.cost_of(plan)
        if any(spent[metric] > limit for metric, limit in here.limits(budget).items()):
            raise SystemExit(f"{name}: a plan costs {spent}, over its budget, on {prompt}")
        if number >= WARM_UP:
            seconds.append(took)
            stated.append(plan.solver["gap"])
            if len(gaps) < PROVEN:
                gaps.append(gap_from_best(plan, here, budget, utilities))
    median, p95 = np.quantile(seconds, [0.5, 0.95]).tolist()
    return Row(name, len(seconds), build_seconds, 1e3 * median, 1e3 * p95, max(stated), max(gaps))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llava-7b", help="alias or folder")
    parser.add_argument("--prompts", type=int, default=200, help="for every budget")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts' sizes")
    parser.add_argument("--json", action="store_true", help="one JSON document on stdout")
    arguments = parser.parse_args()
    graph, _, _ = lowered_graph(find_model(arguments.model))
    with tempfile.TemporaryDirectory() as folder:
        paired = with_pairs(graph, Path(folder), arguments.seed)
        rows = [measure(graph, name, arguments.prompts, arguments.seed, paired) for name in CASES]
    documents = [vars(row) for row in rows]
    if arguments.json:
        print_json(documents)
    else:
        print_records(COLUMNS, documents)


if __name__ == "__main__":
    main()

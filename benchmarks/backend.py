"""Does torch.compile(backend="planner") save the time that a plan saves in FLOPs?

    python benchmarks/backend.py [--budgets 0.5 1] [--rounds N] [--threads N] [--clock wall|cpu]

The LLaMA-shaped decoder of ``realised.py`` reads a prompt of 640 tokens, compiled by inductor alone
and compiled by planner with inductor behind it; both sides take turns, medians. Realised is the
ratio of their times, ideal that of the FLOPs; every new plan is only data to the compiled graph. A
row stands only if the narrowed model agrees with the masked one, and only if nothing was compiled
again.
"""

from __future__ import annotations

import argparse
import copy
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch
from realised import PARITY, TOKENS, Invalid, build, draw
from torch import Tensor
from torch._dynamo.utils import counters

import planner
from planner.cli.console import print_json, table
from planner.ir.cost.price import operator_flops
from planner.ir.graph import Graph
from planner.ir.lowering import lower_model
from planner.models.running.masked import Gates, MaskedExecutor
from planner.plan import Plan
from planner.planning.compiler import specialised

KINDS = ("layers", "heads and mlp")
BUDGETS = (0.5, 0.65, 0.85, 1.0)


@dataclass(frozen=True)
class Row:
    """One plan: time over that of inductor alone, FLOPs over those of the base model."""

    plan: str
    budget: float
    ideal: float
    realised: float
    score: float
    base_seconds: float


def flops(graph: Graph, plan: Plan) -> int:
    """Of the prompt, under a plan."""
    sizes = {"batch": 1, "images": 0, "query": TOKENS, "context": TOKENS}
    return sum(operator_flops(operator, sizes) for operator in specialised(graph, plan))


def prefill(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Logits of the last token."""
    with torch.no_grad():
        logits: Tensor = model(**inputs, logits_to_keep=1, use_cache=False).logits
    return logits


def turns(sides: list[Callable[[], Any]], rounds: int, clock: Callable[[], float]) -> list[float]:
    """Median seconds of each side; the first round warms up."""
    taken: list[list[float]] = [[] for _ in sides]
    for _ in range(rounds + 1):
        for side, seconds in zip(sides, taken, strict=True):
            start = clock()
            side()
            seconds.append(clock() - start)
    return [median(seconds[1:]) for seconds in taken]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--budgets", nargs="+", type=float, default=BUDGETS)
    parser.add_argument("--rounds", type=int, default=9, help="timed runs of each side")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    clock = time.perf_counter if options.clock == "wall" else time.process_time
    model, inputs = build("decoder")
    graph = lower_model(model, "decoder")
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    alone = torch.compile(model)
    settings = {"budget": 1.0, "utilities": "prior"}
    planned = torch.compile(twin, backend="planner", options=settings)
    prefill(alone, inputs)
    prefill(planned, inputs)
    compiled = counters["stats"]["unique_graphs"]
    base = flops(graph, draw(graph, "none", 1.0, 0))
    rows = []
    try:
        for kind in KINDS:
            for budget in options.budgets:
                plan = draw(graph, kind, budget, 0)
                planner.budget(planned, plan)
                with MaskedExecutor(model, graph).using(Gates.of([plan], graph)):
                    expected = prefill(model, inputs)
                error = float((prefill(planned, inputs) - expected).norm() / expected.norm())
                if not error <= PARITY:
                    raise Invalid(f"{kind} at {budget} is {error:.1e} off the masked model")
                sides = [lambda: prefill(alone, inputs), lambda: prefill(planned, inputs)]
                stock, taken = turns(sides, options.rounds, clock)
                if counters["stats"]["unique_graphs"] != compiled:
                    raise Invalid(f"{kind} at {budget} made torch compile again")
                ideal = flops(graph, plan) / base
                rows.append(Row(kind, budget, ideal, taken / stock, taken / stock / ideal, stock))
                print(rows[-1], file=sys.stderr)
    except Invalid as reason:
        print(f"no figures: {reason}", file=sys.stderr)
        return 1
    if options.json:
        print_json({"options": vars(options), "rows": [asdict(row) for row in rows]})
    else:
        names = list(asdict(rows[0]))
        table(names, [_cells(row) for row in rows])
    return 0


def _cells(row: Row) -> list[str]:
    return [f"{v:.3f}" if isinstance(v, float) else v for v in asdict(row).values()]


if __name__ == "__main__":
    sys.exit(main())

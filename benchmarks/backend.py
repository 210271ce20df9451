"""Does torch.compile(backend="planner") save the time that a plan saves in FLOPs?

    python benchmarks/backend.py [--budgets 0.5 1] [--rounds N] [--threads N] [--clock wall|cpu]
    python benchmarks/backend.py --inner eager    # tries the harness; its times mean nothing

The LLaMA-shaped decoder of ``realised.py`` reads a prompt of 640 tokens, compiled by inductor alone
and compiled by planner with inductor behind it; both sides take turns, medians. Realised is the
ratio of their times, ideal that of the FLOPs; every new plan is only data to the compiled graph. A
row stands only if the narrowed model agrees with the masked one, and only if nothing was compiled
again.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from realised import Bench, Invalid, check, draw, options_of
from torch import nn
from torch._dynamo.utils import counters

import planner
from planner.cli.console import print_json, print_records

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


def measure(bench: Bench, budgets: Sequence[float], inner: str) -> Iterator[Row]:
    """Rows of all kinds of plans."""
    alone = torch.compile(bench.stock, backend=inner)
    # PyTorch's type of options knows no floats.
    settings: dict[str, Any] = {"budget": 1.0, "utilities": "prior", "inner": inner}
    planned = cast(nn.Module, torch.compile(bench.planned, backend="planner", options=settings))
    runs = [partial(bench.prefill, model) for model in (alone, planned)]
    for run in runs:
        run()
    compiled = counters["stats"]["unique_graphs"]
    for kind in KINDS:
        for budget in budgets:
            plan = draw(bench.graph, kind, budget, 0)
            ideal = bench.flops(bench.by_hand(plan)) / bench.flops(bench.stock)
            planner.budget(planned, plan)
            check(f"{kind} at {budget}", runs[1](), bench.masked(plan))
            (realised,) = bench.ratios([partial(bench.seconds, run) for run in runs])
            if counters["stats"]["unique_graphs"] != compiled:
                raise Invalid(f"{kind} at {budget} made torch compile again")
            yield Row(kind, budget, ideal, realised, realised / ideal)


def main() -> int:
    parser = options_of(__doc__, BUDGETS)
    parser.add_argument("--inner", default="inductor", help="what compiles: inductor or eager")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    try:
        bench = Bench.of("decoder", torch.float32, options)
        for row in measure(bench, options.budgets, options.inner):
            rows.append(asdict(row))
            print(row, file=sys.stderr)
    except Invalid as reason:
        print(f"no figures: {reason}", file=sys.stderr)
        return 1
    if options.json:
        print_json({"options": vars(options), "rows": rows})
    else:
        columns = {"plan": "{plan}", "budget": "{budget:g}"}
        figures = ("ideal", "realised", "score")
        print_records(columns | {name: f"{{{name}:.3f}}" for name in figures}, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

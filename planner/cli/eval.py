"""``planner eval``: accuracy under budgets on questions about rendered scenes."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import Budgets, Dtype, Place, Scheduler, command, parse_fractions
from planner.cli.console import Console, table

if TYPE_CHECKING:
    from planner.planning.compiler import Request


@command(
    "model", "switches", "tokens", "utilities", "trust_remote_code",
    switches="Axes of static plans, as for compile.",
)  # fmt: skip
def eval_command(
    request: Request,
    console: Console,
    budgets: Budgets = "1,0.85,0.6",
    scheduler: Scheduler = None,
    samples: Annotated[int, typer.Option("--samples", help="Questions.")] = 300,
    seed: Annotated[int, typer.Option("--seed", help="Which questions.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    batch: Annotated[int, typer.Option("--batch", help="Questions asked together.")] = 64,
    mask: Annotated[
        bool, typer.Option("--mask", help="Multiply by zero instead of skipping (scheduler only).")
    ] = False,
    dtype: Dtype = "auto",
    device: Place = "cpu",
) -> None:
    """Measure accuracy per question family under budgets, through generate()."""
    from planner.ir.errors import InputError
    from planner.ir.lowering import lower_model
    from planner.loading import load_model
    from planner.models.scheduling import compile_schedule, load_scheduled
    from planner.training.budget_accuracy import TEXT_TOKENS, UnderBudgets
    from planner.training.data import SPLITS, SceneQuestions

    model, trust = request.model, request.trust_remote_code
    fractions = parse_fractions(budgets)
    for name, value in (("samples", samples), ("batch", batch)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1")
    if split not in SPLITS:
        raise InputError(f"unknown split '{split}': choose from {', '.join(SPLITS)}")
    if mask and scheduler is None:
        raise InputError("--mask is for a --scheduler")
    questions = SceneQuestions(split, samples, seed)
    results: list[dict[str, Any]] = []
    with console.status() as update:
        update("load")
        scheduled = None
        if scheduler is not None:
            schedule = compile_schedule(
                model, fractions[0], scheduler, request.tokens, trust_remote_code=trust
            )
            loaded, processor, scheduled = load_scheduled(schedule, dtype, device, trust, mask)
            graph = scheduled.graph
        else:
            loaded, processor, _ = load_model(model, dtype, device, trust)
            update("lower")
            graph = lower_model(loaded, model)
        how = replace(request, text_tokens=TEXT_TOKENS)
        bench = UnderBudgets(
            loaded, processor, graph, questions, scheduled, how, request.tokens, batch
        )
        for fraction in fractions:
            update(f"budget {fraction:g}")
            results.append(bench.measure(fraction))
    document = {
        "model": model,
        "scheduler": scheduler,
        "tokens": request.tokens,
        "split": split,
        "seed": seed,
        "results": results,
    }
    console.show(document, lambda: _print(results))


def _print(results: list[dict[str, Any]]) -> None:
    families = list(results[0]["families"])
    headers = ["budget", "FLOPs", "used", "accuracy", *families, "plans", "violations"]
    rows = [
        [
            f"{result['budget']:g}",
            f"{result['cost_fraction']:.3f}",
            f"{result['utilisation']:.3f}",
            f"{result['accuracy']:.3f}",
            *(f"{result['families'][family]:.3f}" for family in families),
            str(result["plans"]),
            str(result["violations"]),
        ]
        for result in results
    ]
    table(headers, rows)

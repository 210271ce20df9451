"""``planner eval``: accuracy under budgets on questions about rendered scenes."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from planner.cli.printing import Json, Quiet, Verbose, print_json, status, table
from planner.cli.shared_options import Dtype, Model, TrustRemoteCode, parse_fractions
from planner.cli.with_scheduler import SchedulerOption

__all__ = ["eval_command"]


def eval_command(
    model: Model,
    budgets: Annotated[
        str, typer.Option("--budgets", help="Fractions of the base model, by commas.")
    ] = "1,0.85,0.6",
    scheduler: SchedulerOption = None,
    switches: Annotated[
        str, typer.Option("--switches", help="Of static plans, as for compile.")
    ] = "all",
    tokens: Annotated[
        str | None, typer.Option("--tokens", help="A token selector, such as fastv:k=2,r=0.5.")
    ] = None,
    utilities: Annotated[str, typer.Option("--utilities", help="As for compile.")] = "prior",
    samples: Annotated[int, typer.Option("--samples", help="Questions.")] = 300,
    seed: Annotated[int, typer.Option("--seed", help="Which questions.")] = 0,
    split: Annotated[str, typer.Option("--split", help="train, val or test.")] = "test",
    batch: Annotated[int, typer.Option("--batch", help="Questions asked together.")] = 64,
    mask: Annotated[
        bool, typer.Option("--mask", help="Multiply by zero instead of skipping (scheduler only).")
    ] = False,
    dtype: Dtype = "auto",
    device: Annotated[str, typer.Option("--on", help="Where to run: cpu, cuda.")] = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure accuracy per question family under budgets, through generate()."""
    from planner.ir.errors import InputError
    from planner.ir.lowering import lower_model
    from planner.loading import load_model
    from planner.models.scheduling import compile_schedule, load_scheduled
    from planner.planning.compiler import Request
    from planner.training.budget_accuracy import TEXT_TOKENS, UnderBudgets
    from planner.training.data import SPLITS, SceneQuestions

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
    with status(not (quiet or as_json), verbose) as update:
        update("load")
        scheduled = None
        if scheduler is not None:
            schedule = compile_schedule(
                model, fractions[0], scheduler, tokens, trust_remote_code=trust_remote_code
            )
            loaded, processor, scheduled = load_scheduled(
                schedule, dtype, device, trust_remote_code, mask
            )
            graph = scheduled.graph
        else:
            loaded, processor, _ = load_model(model, dtype, device, trust_remote_code)
            update("lower")
            graph = lower_model(loaded, model)
        request = Request(model, switches=switches, utilities=utilities, text_tokens=TEXT_TOKENS)
        bench = UnderBudgets(loaded, processor, graph, questions, scheduled, request, tokens, batch)
        for fraction in fractions:
            update(f"budget {fraction:g}")
            results.append(bench.measure(fraction))
    document = {
        "model": model,
        "scheduler": scheduler,
        "tokens": tokens,
        "split": split,
        "seed": seed,
        "results": results,
    }
    if as_json:
        print_json(document)
    elif not quiet:
        _print(results)


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

"""``planner eval``: accuracy under budgets on questions about rendered scenes."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import partial
from typing import Annotated, Any

import typer

from planner.cli.command_options import (
    MOST_SEED,
    Budgets,
    Dtype,
    Place,
    Scheduler,
    Split,
    check_beside_scheduler,
    command,
    parse_fractions,
)
from planner.cli.console import Console, print_records
from planner.cli.spreading import Ray, check_ray, spread_over
from planner.planning.request import Request


@command(
    "model", "switches", "tokens", "utilities", "trust_remote_code",
    switches="Axes of static plans, as for compile.",
)  # fmt: skip
def eval_command(
    request: Request,
    console: Console,
    budgets: Budgets = "1,0.85,0.6",
    scheduler: Scheduler = None,
    samples: Annotated[int, typer.Option(min=1, help="Questions.")] = 300,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Which questions.")] = 0,
    split: Annotated[Split, typer.Option(help="Of the scenes.")] = "test",
    families: Annotated[
        str | None,
        typer.Option(
            metavar="LIST", help="Kinds of questions, such as existence,count [default: all]."
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Questions asked together.")] = 64,
    mask: Annotated[
        bool, typer.Option("--mask", help="Multiply by zero instead of skipping (scheduler only).")
    ] = False,
    prior: Annotated[
        bool,
        typer.Option("--language-prior", help="Also score the best guess without the picture."),
    ] = False,
    dtype: Dtype = "auto",
    device: Place = "cpu",
    ray: Ray = None,
) -> None:
    """Measure accuracy per question family under budgets, through generate()."""
    import torch

    from planner.ir.errors import InputError
    from planner.models.recovery.recovering import Recovering
    from planner.models.scheduling import load_deciding
    from planner.planning.utilities import OF_WEIGHTS
    from planner.training.data import SceneQuestions, families_of
    from planner.training.evaluate import TEXT_TOKENS, UnderBudgets, language_prior

    fractions = parse_fractions(budgets)
    if mask and scheduler is None:
        raise InputError("--mask is for a --scheduler")
    if scheduler is not None:
        check_beside_scheduler(request)
    check_ray(ray)
    asked = families_of(families)
    questions = SceneQuestions(split, samples, seed, asked)
    results: list[dict[str, Any]] = []
    with console.status() as update:

        def say(stage: str, done: int, of: int) -> None:
            update(f"{stage}: {done} of {of} batches")

        load = partial(load_deciding, request, scheduler, fractions[0], dtype, device, mask)
        loaded = load(update)
        how = replace(request, text_tokens=TEXT_TOKENS)
        if scheduler is None and how.utilities in OF_WEIGHTS:
            update("measure what switches are worth")
            known = Recovering(loaded.model, loaded.graph, processor=loaded.processor)
            how = replace(how, utilities=known.utilities(how).path)
        batches, threads = math.ceil(samples / batch), torch.get_num_threads()
        with spread_over(ray, loaded, load, batches, update, threads, device) as spread:
            bench = UnderBudgets(loaded, questions, how, batch, spread)
            for fraction in fractions:
                results.append(bench.measure(fraction, partial(say, f"budget {fraction:g}")))
    document: dict[str, Any] = {
        "model": request.model,
        "scheduler": scheduler,
        "tokens": request.tokens,
        "split": split,
        "seed": seed,
        "families": asked,
        "results": results,
    }
    if prior:
        training = SceneQuestions("train", 10 * samples, seed, asked)
        document["language_prior"] = language_prior(training, questions)
    console.show(document, lambda: _print(results, document.get("language_prior")))


def _print(results: list[dict[str, Any]], prior: dict[str, Any] | None) -> None:
    accuracies = {"accuracy": "{accuracy:.3f}"}
    for group in ("families", "difficulty"):
        accuracies |= {kind: f"{{{group}[{kind}]:.3f}}" for kind in results[0][group]}
    columns = {
        "budget": "{budget:g}",
        "FLOPs": "{cost_fraction:.3f}",
        "used": "{utilisation:.3f}",
        **accuracies,
        "plans": "{plans}",
        "violations": "{violations}",
    }
    print_records(columns, results)
    if prior is not None:
        print_records(accuracies, [prior], "the best guess without the picture")

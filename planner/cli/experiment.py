"""``planner experiment``: tables of results, trained and measured by one command each."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from planner.cli.command_options import Settings, command
from planner.cli.console import Console, say


@command()
def experiment_command(
    console: Console,
    name: Annotated[
        str,
        typer.Argument(
            help="table1, table3, baselines, warm-start, dynamic, smollm2, exp1, exp2, exp3."
        ),
    ],
    seeds: Annotated[str, typer.Option(help="Training runs, by commas.")] = "0,1,2",
    samples: Annotated[int, typer.Option(min=1, help="Test questions per seed.")] = 2000,
    work: Annotated[Path, typer.Option(help="Where models and measured cells are kept.")] = Path(
        "build/experiments"
    ),
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="Folder for NAME.json, NAME.md and NAME.svg."),
    ] = None,
    variants: Annotated[
        str | None,
        typer.Option(help="Of exp1 to exp3: what is measured if missing, by semicolons."),
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Of exp1 to exp3: at which budgets, by commas.")
    ] = None,
    settings: Settings = None,
) -> None:
    """Train and measure one table of results; what is there already is not done again.

    What the page in the output's folder has of exp1 to exp3 counts as there, wherever it was
    measured.
    """
    from planner.files import output_folder
    from planner.ir.errors import InputError, check_known
    from planner.training.experiments import EXPERIMENTS, Runs, write_results

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds '{seeds}' is not a list such as 0,1,2") from None
    try:
        shares = [float(part) for part in budgets.split(",")] if budgets is not None else []
    except ValueError:
        raise InputError(f"--budgets '{budgets}' is not a list such as 0.65,0.35") from None
    names = [part.strip() for part in variants.split(";")] if variants is not None else []
    check_known("experiment", name, EXPERIMENTS)

    def progress(text: str) -> None:
        if not console.quiet and (console.verbose or not console.as_json):
            say(f"planner: {text}")

    experiment = EXPERIMENTS[name]
    of = settings or []
    runs = Runs(name, work, numbers, samples, of, progress, names, shares, output)
    experiment.check(runs)
    output_folder(work)
    if output is not None:
        output_folder(output)
    for found in experiment.run(runs):
        if output is not None:
            write_results(found, output)
    console.show(found, lambda: print(experiment.markdown(found)))

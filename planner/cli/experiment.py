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
    settings: Settings = None,
) -> None:
    """Train and measure one table of results; what is there already is not done again."""
    from planner.files import output_folder
    from planner.ir.errors import InputError, check_known
    from planner.training.experiments import EXPERIMENTS, Runs, write_results

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds '{seeds}' is not a list such as 0,1,2") from None
    check_known("experiment", name, EXPERIMENTS)
    output_folder(work)
    if output is not None:
        output_folder(output)

    def progress(text: str) -> None:
        if not console.quiet and (console.verbose or not console.as_json):
            say(f"planner: {text}")

    experiment = EXPERIMENTS[name]
    for found in experiment.run(Runs(name, work, numbers, samples, settings or [], progress)):
        if output is not None:
            write_results(found, output)
    console.show(found, lambda: print(experiment.markdown(found)))

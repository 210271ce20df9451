"""``planner experiment``: tables of results, trained and measured by one command each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli.command_options import Settings, command
from planner.cli.console import Console, print_records, say


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
    from planner.files import output_folder, write_text
    from planner.ir.errors import InputError
    from planner.training.experiments import EXPERIMENTS, run_experiment
    from planner.training.experiments.comparison_page import (
        comparison_markdown,
        run_comparison,
        write_comparison,
    )
    from planner.training.experiments.comparisons import COMPARISONS
    from planner.training.experiments.results_page import write_page
    from planner.training.experiments.smollm2 import run_smollm2, smollm2_page
    from planner.training.experiments.sparse_answers import dynamic_page, run_dynamic

    try:
        numbers = [int(part) for part in seeds.split(",")]
    except ValueError:
        raise InputError(f"--seeds '{seeds}' is not a list such as 0,1,2") from None
    if name not in (known := (*EXPERIMENTS, *COMPARISONS, "dynamic", "smollm2")):
        raise InputError(f"unknown experiment '{name}': choose from {', '.join(known)}")
    output_folder(work)
    if output is not None:
        output_folder(output)

    def progress(text: str) -> None:
        if not console.quiet and (console.verbose or not console.as_json):
            say(f"planner: {text}")

    if name == "smollm2":
        for found in run_smollm2(work, progress):
            if output is not None:
                write_text(output / "smollm2.json", json.dumps(found, indent=1) + "\n")
                write_text(output / "smollm2.md", smollm2_page(found))
        console.show(found, lambda: print(smollm2_page(found)))
        return
    if name == "dynamic":
        found = run_dynamic(work, numbers, samples, settings or [], progress)
        if output is not None:
            write_text(output / "dynamic.json", json.dumps(found, indent=1) + "\n")
            write_text(output / "dynamic.md", dynamic_page(found))
        console.show(found, lambda: print(dynamic_page(found)))
        return
    if name in COMPARISONS:
        for found in run_comparison(name, work, numbers, samples, settings or [], progress):
            if output is not None:
                write_comparison(found, output)
        console.show(found, lambda: print(comparison_markdown(found)))
        return
    results = run_experiment(name, work, numbers, samples, settings or [], progress)
    if output is not None:
        write_page(results, output)
    console.show(results, lambda: _print(results))


def _print(results: dict[str, Any]) -> None:
    columns = {
        "method": "{method}",
        "tokens": "{tokens}",
        "budget": "{budget:g}",
        "FLOPs": "{cost_fraction:.3f}",
        "accuracy": "{accuracy:.3f}",
        "spread": "{accuracy_spread:.3f}",
    }
    rows = [{**row, "tokens": row["tokens"] or "all"} for row in results["summary"]]
    print_records(columns, rows, results["title"])

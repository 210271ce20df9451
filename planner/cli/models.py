"""``planner models``: aliases, and what planner does with transformers' architectures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.command_options import command
from planner.cli.console import Console, say, table

if TYPE_CHECKING:
    from planner.models.checking import Checked


@command()
def models_command(
    console: Console,
    check: Annotated[
        bool,
        typer.Option(
            "--check",
            help="Lower every image-text architecture of transformers, and 40 of text alone; run a "
            "small model of each.",
        ),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option(help="With --check: just these model types.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            help="With --check: keep the table in this Markdown file, and go on where it stopped.",
        ),
    ] = None,
) -> None:
    """List model aliases; with --check, what can be lowered, and what runs."""
    from planner.ir.errors import InputError
    from planner.planning.catalog import ALIASES

    if not check:
        if only or output is not None:
            raise InputError("--only and --output are of --check: give it too")
        known = {
            name: f"{a.about} ({a.hub_id})" if a.hub_id else a.about for name, a in ALIASES.items()
        }
        console.show({"aliases": known}, lambda: table(["alias", "model"], list(known.items())))
        return
    from planner.models.checking import check_types

    def progress(done: int, of: int, name: str) -> None:
        if console.shows_progress:
            end = "\r" if sys.stderr.isatty() else "\n"
            sys.stderr.write(f"{done + 1}/{of} {name:<30}{end}")

    results = check_types(only or [], output, progress)
    if console.shows_progress and sys.stderr.isatty():
        say(" " * 50)
    document = {"models": [asdict(row) for row in results]}
    console.show(document, lambda: _print_checks(results, console.verbose))


def _print_checks(results: Sequence[Checked], verbose: bool) -> None:
    from planner.models.checking import CHECKS, sites_of, summary

    rows = []
    for row in results:
        remarks = "; ".join(row.remarks)
        answers = (row.answers[check] or "-" for check in CHECKS)
        rows.append([row.model_type, sites_of(row), *answers, remarks[: None if verbose else 110]])
    table(["model type", "sites", *CHECKS, "remarks"], rows)
    counts = summary(results)
    said = ", ".join(f"{counts[check]} {check}" for check in CHECKS)
    print(f"\n{said} of {counts['rows']}; {counts['sites']} with sites")

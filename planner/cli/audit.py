"""``planner audit``: labels against the proven optimum of their own problems."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.command_options import TrustRemoteCode, command
from planner.cli.console import Console, print_records
from planner.cli.spreading import Ray, check_ray, spread_over

if TYPE_CHECKING:
    from planner.audit.report import Audit


@command()
def audit_command(
    console: Console,
    labels: Annotated[Path, typer.Argument(help="File that planner labels wrote.")],
    model: Annotated[
        str | None,
        typer.Option("-m", help="What to price plans on [default: the file's model]."),
    ] = None,
    exact: Annotated[
        bool, typer.Option("--exact", help="Check every optimum with a plain CP-SAT model too.")
    ] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write a page (.html) as well.")
    ] = None,
    ray: Ray = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Solve every label's problem to proven optimality and say how far off the label is."""
    from planner.audit import audit, read_labels
    from planner.audit.audit_page import page
    from planner.files import check_output, write_text
    from planner.planning.catalog import find_model
    from planner.planning.graph_cache import lowered_graph

    if output is not None:
        check_output(output, ".html")
    check_ray(ray)
    with ExitStack() as stack:
        with console.status() as update:
            update("read the labels")
            read = read_labels(labels)
            update("lower")
            graph = lowered_graph(find_model(model or read.terms.model, trust_remote_code))[0]
            spread = stack.enter_context(spread_over(ray, None, lambda: None, len(read), update))
        progress = stack.enter_context(console.progress_bar("labels"))
        found = audit(read, graph, exact=exact, spread=spread, progress=progress)
    if output is not None:
        write_text(output, page(found))

    def text() -> None:
        _print_summary(found, console.verbose)
        if output is not None:
            print(f"wrote {output}")

    console.show({"file": str(labels), **found.summary}, text)


def _print_summary(found: Audit, verbose: bool) -> None:
    from planner.audit.report import BUDGET_COLUMNS

    summary = found.summary
    print(
        f"{summary['labels']} labels for {summary['model']} ({summary['samples']} samples, "
        f"{summary['switches']}), plans from {summary['source']}\n"
    )
    print_records(BUDGET_COLUMNS, found.budget_rows)
    print()
    if summary["priced_wrong"]:
        print(f"{summary['priced_wrong']} labels state another cost or limit than the cost model")
    dominated = summary["dominated"]
    print(
        f"{dominated['count']} labels are dominated: another plan is worth more and costs no more"
    )
    for example in dominated["examples"] if verbose else ():
        print(
            f"  {example['sample']} at {example['budget']:g}: "
            f"off {', '.join(example['without']) or '-'}, on {', '.join(example['with']) or '-'}"
        )
    if "exact" in summary:
        exact = summary["exact"]
        print(f"CP-SAT contradicts {exact['different']} of {exact['checked']} optima")
    surrogate = summary.get("surrogate", {})
    if surrogate.get("budgets"):
        tried = surrogate["samples"]
        print(f"\nevery plan tried on {tried} samples; regret in nats per answer token, by decider")
        print_records(found.surrogate_columns, surrogate["budgets"])
        print()
    print(f"{summary['seconds']:.1f} s, {1e3 * summary['seconds_per_label']:.1f} ms a label")

"""``planner heal``: a short training under a plan, towards what the base model says."""

from __future__ import annotations

from typing import Annotated

import typer

from planner.cli.command_options import (
    MOST_SEED,
    CalibrationData,
    NewFolder,
    PlanFile,
    command,
)
from planner.cli.console import Console
from planner.cli.stock_model import load_stock
from planner.planning.request import Request


@command("model", "trust_remote_code")
def heal_command(
    request: Request,
    console: Console,
    plan: PlanFile,
    output: NewFolder,
    data: CalibrationData,
    steps: Annotated[int, typer.Option(help="Steps of the optimiser.")] = 100,
    batch: Annotated[int, typer.Option(help="Samples a step.")] = 8,
    rank: Annotated[
        int, typer.Option(help="Of LoRA's matrices; 0 trains the weights themselves.")
    ] = 32,
    learning_rate: Annotated[
        float | None, typer.Option(help="At its highest; 2e-3, or 2e-4 at rank 0.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Which samples come when.")] = 0,
) -> None:
    """Refit a plan's weights, train them on the base model's outputs, and export the result."""
    from planner.cli.export import show_exported
    from planner.files import check_new
    from planner.models.recovery.healing import Healing, heal
    from planner.models.recovery.recovering import Recovering
    from planner.plan import load_plan
    from planner.planning.figures import check_figures

    wanted = load_plan(plan)
    settings = Healing(steps, batch, rank, learning_rate, seed)
    check_new(output)
    with console.status() as update:
        stock = load_stock(request, update, "float32")
        model, graph = stock.model, stock.graph
        check_figures(wanted, graph)
        update("read the samples")
        known = data.read(model, stock.processor, "refit")
        update("refit")
        weights = Recovering(model, graph, "refit", known, stock.processor).weights(wanted)
    with console.progress_bar("heal") as progress:
        healed = heal(
            model, graph, wanted, weights, known, settings, lambda done, _: progress(done, steps)
        )
    with console.status():
        done = stock.export(wanted, healed.weights, output, dict(known[0].inputs))
    first, last = healed.losses[0], sum(healed.losses[-10:]) / len(healed.losses[-10:])
    show_exported(
        console, done, wanted, {"refitted": len(weights), "kl_before": first, "kl_after": last}
    )

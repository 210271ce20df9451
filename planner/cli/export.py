"""``planner export``: a plan's model as a smaller checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planner.cli.command_options import CalibrationData, NewFolder, PlanFile, Recover, command
from planner.cli.console import Console, amount
from planner.cli.stock_model import load_stock
from planner.planning.request import Request

if TYPE_CHECKING:
    from planner.models.export import Exported
    from planner.plan import Plan


@command("model", "trust_remote_code")
def export_command(
    request: Request,
    console: Console,
    plan: PlanFile,
    output: NewFolder,
    data: CalibrationData,
    recover: Recover = "",
) -> None:
    """Write the weights that a plan keeps as a checkpoint of their own.

    Where a stock config can say the plan's sizes, stock transformers loads the folder; otherwise
    planner.models.export.load does.
    """
    from planner.files import check_new
    from planner.ir.errors import InputError
    from planner.loading import noise_image, prompt_inputs
    from planner.plan import load_plan
    from planner.planning.figures import check_figures

    wanted = load_plan(plan)
    check_new(output)
    if data and not recover:
        raise InputError("--images and --text are what --recover refit is calibrated on")
    with console.status() as update:
        stock = load_stock(request, update)
        check_figures(wanted, stock.graph)
        picture = noise_image() if hasattr(stock.processor, "image_processor") else None
        inputs = prompt_inputs(stock.model, stock.processor, "Describe this image.", picture)
        update("recover")
        weights = stock.recovering(recover, data).weights(wanted)
        update("export")
        done = stock.export(wanted, weights, output, inputs)
        if stock.folder is None:
            stock.processor.save_pretrained(output)
    show_exported(console, done, wanted, {"refitted": len(weights)})


def show_exported(
    console: Console, done: Exported, wanted: Plan, changed: Mapping[str, Any]
) -> None:
    """Say what was written under a plan, and facts about weights that were changed for it."""
    document = {
        "folder": str(done.folder),
        "plain": done.plain,
        "why_not_plain": done.why_not or None,
        "parameters": done.parameters,
        "base_parameters": done.base_parameters,
        "relative_error": done.error,
        "token_stages": len(wanted.tokens),
        "kv": wanted.kv or None,
        **changed,
    }

    def summary() -> None:
        share = done.parameters / done.base_parameters
        print(
            f"{amount(done.parameters, 'count')} of {amount(done.base_parameters, 'count')} "
            f"parameters ({share:.1%}); logits differ from the planned model's by {done.error:.1e}"
        )
        for what, value in changed.items():
            if value:
                print(f"{what.replace('_', ' ')}: {value:.4g}")
        if wanted.tokens or wanted.kv:
            print(
                "note: token stages and KV policies are not part of weights; plan.yaml in the "
                "folder names them, and running them takes planner"
            )
        if done.plain:
            print("a plain checkpoint: stock transformers loads it with from_pretrained")
        else:
            print(f"not a plain checkpoint: {done.why_not}")
            print("load it with planner.models.export.load")
        print(f"wrote {done.folder}")

    console.show(document, summary)

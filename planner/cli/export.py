"""``planner export``: a plan's model as a smaller checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from planner.cli.command_options import (
    Images,
    NewFolder,
    PlanFile,
    Recover,
    Samples,
    Text,
    command,
)
from planner.cli.console import Console, amount
from planner.planning.request import Request

if TYPE_CHECKING:
    import torch

    from planner.models.export import Exported
    from planner.plan import Plan

# As safetensors names them.
_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


@command("model", "trust_remote_code")
def export_command(
    request: Request,
    console: Console,
    plan: PlanFile,
    output: NewFolder,
    recover: Recover = "",
    images: Images = None,
    text: Text = None,
    samples: Samples = 64,
) -> None:
    """Write the weights that a plan keeps as a checkpoint of their own.

    Where a stock config can say the plan's sizes, stock transformers loads the folder; otherwise
    planner.models.export.load does.
    """
    from planner.files import check_new
    from planner.ir.errors import InputError
    from planner.loading import load_model, noise_image, prompt_inputs
    from planner.models.export import export
    from planner.models.recovery import replaced, storable
    from planner.models.recovery.oneshot import read_inputs
    from planner.models.recovery.recovering import Recovering
    from planner.plan import load_plan
    from planner.planning.catalog import find_model
    from planner.planning.figures import check_figures
    from planner.planning.graph_cache import lowered_graph

    model, trust = request.model, request.trust_remote_code
    wanted = load_plan(plan)
    check_new(output)
    if (images or text) and not recover:
        raise InputError("--images and --text are what --recover refit is calibrated on")
    with console.status() as update:
        update("load")
        dtype = find_model(model, trust).dtype
        stock, processor, source = load_model(model, dtype, "cpu", trust)
        update("lower")
        graph = lowered_graph(source)[0]
        check_figures(wanted, graph)
        picture = noise_image() if hasattr(processor, "image_processor") else None
        inputs = prompt_inputs(stock, processor, "Describe this image.", picture)
        update("recover")
        known = read_inputs(stock, processor, images, text, samples) if images or text else None
        weights = Recovering(stock, graph, recover, known, processor).weights(wanted)
        update("export")
        folder = source.folder
        kind = stored_dtype(folder)
        with replaced(stock, storable(weights, kind)):
            done = export(stock, graph, wanted, output, inputs, folder, kind)
        if source.folder is None:
            processor.save_pretrained(output)
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


def stored_dtype(folder: Path | None) -> torch.dtype | None:
    """The precision of the weights in a folder's files, which the config need not name."""
    import torch
    from safetensors import safe_open

    found: dict[torch.dtype, int] = {}
    for path in sorted(folder.glob("*.safetensors")) if folder else ():
        with safe_open(path, "pt") as weights:
            for name in weights.keys():  # noqa: SIM118, it is no mapping
                dtype = _DTYPES.get(weights.get_slice(name).get_dtype())
                if dtype is not None:
                    kind = getattr(torch, dtype)
                    found[kind] = found.get(kind, 0) + 1
    return max(found, key=lambda kind: found[kind]) if found else None

"""``planner calibrate-utilities``: measure what every switch is worth on a few images."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import Dtype, Place, Request, command
from planner.cli.console import Console, say, table

if TYPE_CHECKING:
    from planner.models.calibration import Calibrated

_KINDS = {"all": "all switches", "layer": "layers", "heads": "heads", "mlp": "MLP groups"}


@command("model", "trust_remote_code")
def calibrate_command(
    request: Request,
    console: Console,
    images: Annotated[Path, typer.Option("--images", help="Folder of pictures.")],
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Utilities file (.npz) for compile --utilities.")
    ],
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help='JSON lines {"image", "prompt", "answer"}; answers may be left out.'
        ),
    ] = None,
    method: Annotated[
        str,
        typer.Option("--method", help="leave-one-out, or taylor (one backward pass a sample)."),
    ] = "leave-one-out",
    measure: Annotated[
        str | None,
        typer.Option("--measure", help="loss (needs answers), or kl [default: loss with answers]."),
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="Most samples to use.")] = 32,
    batch: Annotated[int, typer.Option("--batch", help="Switches measured at once.")] = 16,
    seed: Annotated[int, typer.Option("--seed", help="Which samples are drawn.")] = 0,
    dtype: Dtype = "auto",
    device: Place = "cpu",
) -> None:
    """Measure what every layer, head and MLP group is worth, without training.

    A killed run continues when the same command is given again.
    """
    from planner.files import output_folder
    from planner.ir.errors import InputError
    from planner.loading import load_model
    from planner.models.calibration import (
        MEASURES,
        METHODS,
        calibrate,
        read_questions,
        read_samples,
    )
    from planner.planning.compiler import lowered_graph
    from planner.planning.switches import with_switches
    from planner.planning.utilities import Utilities, save_utilities

    if samples < 1 or batch < 1:
        raise InputError("--samples and --batch must be at least 1")
    if method not in METHODS:
        raise InputError(f"unknown method '{method}': choose from {', '.join(METHODS)}")
    if output.suffix != ".npz":
        raise InputError(f"the output '{output}' must be an .npz file")
    questions = read_questions(images, prompts)
    answered = questions[0].answer is not None
    measure = measure or ("loss" if answered else "kl")
    if measure not in MEASURES:
        raise InputError(f"unknown measure '{measure}': choose from {', '.join(MEASURES)}")
    if measure == "loss" and not answered:
        raise InputError("--measure loss needs answers in the prompts file")
    output_folder(output.parent)
    started = time.perf_counter()
    with console.status() as update:
        update("load")
        stock, processor, source = load_model(
            request.model, dtype, device, request.trust_remote_code
        )
        update("lower")
        graph = with_switches(lowered_graph(source)[0])
        update("read the images")
        chosen = read_samples(stock, processor, questions, samples, seed)
    partial = output.with_name(output.name + ".partial")
    try:
        with console.progress_bar("measure") as progress:
            found = calibrate(
                stock,
                graph,
                chosen,
                measure=measure,
                method=method,
                batch=batch,
                seed=seed,
                partial=partial,
                progress=progress,
            )
    except KeyboardInterrupt:
        if partial.exists():
            say(f"what was measured is in '{partial}': the same command goes on from there")
        raise
    seconds = time.perf_counter() - started
    facts = _facts(found)
    utilities = Utilities(output.name, found.sites, found.tokens)
    if found.saturation is not None:
        utilities = Utilities(output.name, found.sites, found.tokens, found.saturation)
    save_utilities(
        output, utilities, graph, json.dumps({"model": request.model, **facts}, sort_keys=True)
    )
    console.show(
        {"utilities": str(output), "model": request.model, **facts, "seconds": seconds},
        lambda: _print_summary(found, output, seconds),
    )


def _facts(found: Calibrated) -> dict[str, Any]:
    """What was measured, without the values themselves."""
    return {
        "method": found.method,
        "measure": found.measure,
        "samples": found.samples,
        "switches": sum(len(values) for values in found.sites.values()),
        "rank_correlation": found.rank_correlation,
        "tokens": {
            "worth": found.tokens,
            "saturation": found.saturation,
            "selector": found.selector,
            "losses": [{"kept": kept, "loss": lost} for kept, lost in found.token_losses],
        },
    }


def _print_summary(found: Calibrated, output: Path, seconds: float) -> None:
    what = "change of the answers' loss" if found.measure == "loss" else "KL from the base model"
    print(f"{found.method} over {found.samples} samples: {what}, nats per answer token")
    print()
    rows = []
    for kind in ("layer", "heads", "mlp"):
        named = {n: v for n, v in found.sites.items() if n.partition(".")[0] == kind}
        values = [(float(x), f"{n}[{i}]") for n, v in named.items() for i, x in enumerate(v)]
        if values:
            (low, _), (high, best) = min(values), max(values)
            mean = sum(x for x, _ in values) / len(values)
            correlation = found.rank_correlation.get(kind)
            rows.append(
                [
                    _KINDS[kind],
                    str(len(values)),
                    f"{low:.5f}",
                    f"{mean:.5f}",
                    f"{high:.5f}",
                    "-" if correlation is None else f"{correlation:.3f}",
                    best,
                ]
            )
    table(["switches", "count", "least", "mean", "most", "Taylor rank", "the most useful"], rows)
    print()
    if "all" in found.rank_correlation:
        print(
            "Spearman rank correlation of the first-order (Taylor) estimate with leave-one-out: "
            f"{found.rank_correlation['all']:.3f}"
        )
    if found.saturation is not None:
        curve = ", ".join(f"{kept:.3f}: {lost:.5f}" for kept, lost in found.token_losses)
        print(f"lost with a fraction of the image tokens kept ({found.selector}): {curve}")
        print(f"all image tokens are worth {found.tokens:.5f}, saturation {found.saturation:.4g}")
    print(f"wrote {output} in {seconds:.1f} s")

"""``planner calibrate-utilities``: measure what every switch is worth on a few inputs."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import (
    MOST_SEED,
    Dtype,
    Images,
    Place,
    Prompts,
    Text,
    command,
)
from planner.cli.console import Console, say, table
from planner.cli.stock_model import load_stock
from planner.planning.request import Request

if TYPE_CHECKING:
    from planner.models.calibration import Calibrated


@command("model", "trust_remote_code")
def calibrate_utilities_command(
    request: Request,
    console: Console,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Utilities file (.npz) for compile --utilities.")
    ],
    images: Images = None,
    text: Text = None,
    prompts: Prompts = None,
    method: Annotated[
        str,
        typer.Option(
            help="leave-one-out, taylor (one backward pass a sample), or refit (what --recover "
            "refit cannot make up for).",
        ),
    ] = "leave-one-out",
    pairs: Annotated[
        bool,
        typer.Option("--pairs", help="Measure what layers, and tokens, are worth together, too."),
    ] = False,
    measure: Annotated[
        str | None,
        typer.Option(help="loss (needs answers), or kl [default: loss with answers]."),
    ] = None,
    samples: Annotated[int, typer.Option(help="Most samples to use.")] = 32,
    batch: Annotated[int, typer.Option(help="Switches measured at once.")] = 16,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Which samples are drawn.")] = 0,
    dtype: Dtype = "auto",
    device: Place = "cpu",
) -> None:
    """Measure what every layer, head and MLP group is worth, without training.

    A killed run continues when the same command is given again.
    """
    from planner.files import check_output
    from planner.ir.errors import InputError, check_known
    from planner.models.calibration import (
        MEASURES,
        METHODS,
        calibrate,
        read_questions,
        weights_digest,
    )
    from planner.models.calibration.measurement import TOKEN_LAYER
    from planner.models.calibration.pair_losses import measure_pairs
    from planner.models.recovery.oneshot import read_inputs
    from planner.models.recovery.recovering import Recovering
    from planner.planning.switches import with_switches
    from planner.planning.utilities import save_utilities

    if samples < 1 or batch < 1:
        raise InputError("--samples and --batch must be at least 1")
    check_known("method", method, (*METHODS, "refit"))
    answered = images is not None and read_questions(images, prompts)[0].answer is not None
    if prompts is not None and images is None:
        raise InputError("--prompts are about --images: give that folder too")
    measure = measure or ("loss" if answered else "kl")
    check_known("measure", measure, MEASURES)
    if measure == "loss" and not answered:
        raise InputError("--measure loss needs answers in the prompts file")
    check_output(output, ".npz")
    started = time.perf_counter()
    with console.status() as update:
        loaded = load_stock(request, update, dtype, device)
        stock, graph = loaded.model, with_switches(loaded.graph)
        update("read the samples")
        chosen = read_inputs(stock, loaded.processor, images, text, samples, prompts, seed)
    partial, partial_pairs = (
        output.with_name(output.name + end) for end in (".partial", ".pairs.partial")
    )
    try:
        with console.progress_bar("measure") as progress:
            found = calibrate(
                stock,
                graph,
                chosen,
                measure=measure,
                method="taylor" if method == "refit" else method,
                batch=batch,
                seed=seed,
                partial=partial,
                progress=progress,
            )
        if method == "refit":
            with console.progress_bar("moments and trials") as progress:
                recovering = Recovering(stock, graph, method, chosen, progress=progress)
                sites = found.sites | recovering.worth(graph, chosen)
            found = replace(found, sites=sites, method=method)
        utilities = found.utilities(output.name)
        if method == "refit":
            utilities = replace(utilities, recover=method)
        if pairs:
            stage = TOKEN_LAYER, found.selector, batch, partial_pairs
            with console.progress_bar("pairs") as progress:
                together = measure_pairs(stock, graph, chosen, found.sites, *stage, progress)
            utilities = replace(
                utilities,
                pairs=together.sites,
                token_fractions=together.fractions,
                token_losses=together.tokens,
            )
    except KeyboardInterrupt:
        if partial.exists():
            say(f"what was measured is in '{partial}': the same command goes on from there")
        raise
    seconds = time.perf_counter() - started
    facts = _facts(found) | {"pairs": len(utilities.pairs)}
    about = {"model": request.model, "weights": weights_digest(stock), **facts}
    save_utilities(output, utilities, graph, json.dumps(about, sort_keys=True))
    for path in (partial, partial_pairs):
        path.unlink(missing_ok=True)
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
    for kind, what in (("layer", "layers"), ("heads", "heads"), ("mlp", "MLP groups")):
        named = {n: v for n, v in found.sites.items() if n.partition(".")[0] == kind}
        values = [(float(x), f"{n}[{i}]") for n, v in named.items() for i, x in enumerate(v)]
        if values:
            (low, _), (high, best) = min(values), max(values)
            mean = sum(x for x, _ in values) / len(values)
            worth = [f"{x:.5f}" for x in (low, mean, high)]
            correlation = found.rank_correlation.get(kind)
            rank = "-" if correlation is None else f"{correlation:.3f}"
            rows.append([what, str(len(values)), *worth, rank, best])
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

"""``planner labels``: a target plan per sample and budget, from measured utilities."""

from __future__ import annotations

import time
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli.command_options import (
    MOST_SEED,
    Budgets,
    Dtype,
    Place,
    Prompts,
    Scheduler,
    Split,
    command,
    parse_fractions,
)
from planner.cli.console import Console
from planner.cli.spreading import Ray, check_ray, spread_over
from planner.planning.request import Request


@command("model", "mlp_groups", "trust_remote_code")
def labels_command(
    request: Request,
    console: Console,
    output: Annotated[
        Path, typer.Option("-o", "--output", help="Labels file (.parquet) for planner audit.")
    ],
    budgets: Budgets = "0.6,0.7,0.8,0.9",
    switches: Annotated[
        str,
        typer.Option(help="adallava-l (counted), or some of layers,heads,mlp."),
    ] = "adallava-l",
    scheduler: Scheduler = None,
    samples: Annotated[int, typer.Option(min=1, help="How many questions.")] = 256,
    tried: Annotated[
        int,
        typer.Option(
            "--try-all", min=0, help="Questions of which every plan's true loss is measured too."
        ),
    ] = 0,
    images: Annotated[
        Path | None, typer.Option(help="Folder of pictures [default: drawn scenes].")
    ] = None,
    prompts: Prompts = None,
    split: Annotated[Split, typer.Option(help="Of the scenes.")] = "train",
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Which questions.")] = 0,
    batch: Annotated[int, typer.Option(min=1, help="Plans that run at once.")] = 16,
    dtype: Dtype = "auto",
    device: Place = "cpu",
    ray: Ray = None,
) -> None:
    """Measure what switches are worth to each sample, and decide its plan for every budget.

    A killed run continues when the same command is given again.
    """
    import torch

    from planner.audit import Terms, require_arrow, write_labels
    from planner.files import check_output
    from planner.ir.errors import InputError
    from planner.models.scheduling import load_deciding
    from planner.training.evaluate import TEXT_TOKENS
    from planner.training.labelling import label_samples
    from planner.training.question_samples import picture_samples, scene_samples

    model = request.model
    fractions = list(dict.fromkeys(parse_fractions(budgets)))
    if prompts is not None and images is None:
        raise InputError("--prompts needs --images")
    # Said before hours of measuring rather than after.
    require_arrow()
    check_ray(ray)
    check_output(output, ".parquet")
    started = time.perf_counter()
    load = partial(load_deciding, request, scheduler, fractions[0], dtype, device, True)
    with ExitStack() as stack:
        with console.status() as update:
            loaded = load(update)
            stock, processor, graph = loaded.model, loaded.processor, loaded.graph
            scheduled = loaded.scheduled
            if scheduled is not None and scheduled.layout.name != switches:
                raise InputError(
                    f"the scheduler decides {scheduled.layout.name}, and the labels are for "
                    f"{switches}: give --switches {scheduled.layout.name}"
                )
            terms = Terms(
                model=model,
                fingerprint=str(graph.properties["fingerprint"]),
                switches=switches,
                source=f"scheduler {scheduler}" if scheduler else "heuristic",
                image_tokens=int(graph.properties.get("image_tokens", 0)),
                text_tokens=TEXT_TOKENS,
                mlp_groups=request.mlp_groups,
            )
            terms.problem(graph, fractions[0])
            update("read the questions")
            if images is None:
                chosen = scene_samples(stock, processor, split, samples, seed)
            else:
                chosen = picture_samples(stock, processor, images, prompts, samples, seed)
            threads = torch.get_num_threads()
            workers = spread_over(ray, loaded, load, len(chosen), update, threads, device)
            spread = stack.enter_context(workers)
        progress = stack.enter_context(console.progress_bar("samples"))
        labels = label_samples(
            stock,
            graph,
            chosen,
            terms,
            fractions,
            tried=tried,
            batch=batch,
            scheduled=scheduled,
            spread=spread,
            partial=output.with_name(output.name + ".partial"),
            progress=progress,
        )
    write_labels(output, labels)
    facts: dict[str, Any] = {
        "labels": len(labels),
        "samples": len(chosen),
        "budgets": fractions,
        "model": model,
        "switches": switches,
        "source": terms.source,
        "tried": min(tried, len(chosen)),
        "seconds": time.perf_counter() - started,
    }

    def text() -> None:
        print(
            f"{facts['labels']} labels for {model}: {facts['samples']} samples under "
            f"{len(fractions)} budgets, {len(labels.switches)} switches ({switches}), "
            f"plans from {terms.source}"
        )
        if facts["tried"]:
            print(f"every one of {1 << len(labels.switches)} plans tried on {facts['tried']}")
        print(f"wrote {output} in {facts['seconds']:.1f} s; see: planner audit {output}")

    console.show({"output": str(output), **facts}, text)

"""``planner train``: train by a configuration."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli.command_options import Settings, command
from planner.cli.console import Console, amount, print_records, say


@command()
def train_command(
    console: Console,
    config: Annotated[Path, typer.Argument(help="A YAML file; see training/configs.")],
    settings: Settings = None,
    estimate: Annotated[
        int | None,
        typer.Option(metavar="N", help="Say what a step takes on N cards, and stop."),
    ] = None,
) -> None:
    """Train a model or a scheduler; a run that was stopped goes on from its last checkpoint.

    Several processes: torchrun or accelerate launch, with -m planner.training.
    """
    from planner.training.requirements import require_extras

    require_extras()
    from transformers.utils import logging

    # Imports transformers' Trainer, which fails without what training needs.
    from planner.training.recipes import load_recipe

    train, parsed = load_recipe(config, settings or [])
    if console.verbose:
        for key, value in parsed.model_dump().items():
            say(f"planner: {key} = {value}")
    if estimate is not None:
        _estimate(console, parsed, estimate)
        return
    started = time.perf_counter()
    if not console.shows_progress:
        logging.disable_progress_bar()
    train(parsed)
    document: dict[str, Any] = {
        "recipe": parsed.model_dump()["recipe"],
        "output_dir": getattr(parsed, "output_dir", None),
        "export_dir": getattr(parsed, "export_dir", None),
        "seconds": time.perf_counter() - started,
    }
    where = document["export_dir"] or document["output_dir"]
    console.show(document, lambda: print(f"trained in {document['seconds']:.0f} s: {where}"))


def _estimate(console: Console, parsed: Any, cards: int) -> None:
    """Say what a training step takes of each card."""
    from planner.ir.errors import InputError
    from planner.training.adallava import AdaLlavaConfig
    from planner.training.memory_estimate import step_bytes

    if not isinstance(parsed, AdaLlavaConfig):
        raise InputError(f"no step of the recipe {parsed.model_dump()['recipe']} is estimated")
    found = step_bytes(parsed, cards)
    rows = [{"what": what.replace("_", " "), "bytes": n} for what, n in asdict(found).items()]
    rows.append({"what": "total", "bytes": found.total})
    document = {"cards": cards, "bytes": {**asdict(found), "total": found.total}}

    def show() -> None:
        shown = [{**row, "bytes": amount(row["bytes"], "bytes")} for row in rows]
        print_records({"on each card": "{what}", "": "{bytes}"}, shown)

    console.show(document, show)

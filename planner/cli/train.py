"""``planner train``: train by a configuration."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from planner.cli.command_options import command
from planner.cli.console import Console, say


@command()
def train_command(
    console: Console,
    config: Annotated[Path, typer.Argument(help="A YAML file; see training/configs.")],
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change the configuration; repeatable."),
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

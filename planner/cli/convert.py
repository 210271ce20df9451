"""``planner convert``: a checkpoint in its authors' own layout as one for stock transformers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from planner.cli.command_options import NewFolder, command
from planner.cli.console import Console, amount


@command()
def convert_command(
    console: Console,
    source: Annotated[Path, typer.Argument(help="Folder of LLaVA-1.5, AdaLLaVA or Dynamic-LLaVA.")],
    output: NewFolder,
    vision_tower: Annotated[
        Path | None,
        typer.Option(help="Folder of the CLIP that the checkpoint goes with."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read tensors, and nothing else, from .bin files."),
    ] = False,
) -> None:
    """Make a stock LLaVA of an authors' checkpoint, and planner's files of what else it holds.

    planner run --model DIR runs it; AdaLLaVA's with --scheduler DIR.
    """
    from planner.models.conversion import convert

    with console.status() as update:
        update("convert")
        done = convert(source, output, vision_tower, allow_pickle)

    def summary() -> None:
        beside = "scheduler" if done.layout.startswith("adallava") else "predictors"
        added = f" and a {beside} of {amount(done.added, 'count')}" if done.added else ""
        print(f"{done.layout}: {amount(done.parameters, 'count')} parameters{added}")
        if done.selector:
            print(f"note: it was trained with --tokens {done.selector}")
        print(f"wrote {done.folder}")

    console.show({**asdict(done), "folder": str(done.folder)}, summary)

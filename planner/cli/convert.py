"""``planner convert``: a checkpoint in its authors' own layout as one for stock transformers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from planner.cli.command_options import NewFolder, command
from planner.cli.console import Console, amount
from planner.files import check_new, output_folder
from planner.ir.errors import InputError

if TYPE_CHECKING:
    from planner.models.conversion import Converted


@command()
def convert_command(
    console: Console,
    source: Annotated[
        Path,
        typer.Argument(
            help="Folder of LLaVA-1.5, AdaLLaVA or Dynamic-LLaVA; or of changes that the recipe "
            "joined-llava has saved, such as smol-llava's, by name or as a folder."
        ),
    ],
    output: NewFolder,
    vision_tower: Annotated[
        Path | None,
        typer.Option(help="Folder of the CLIP that the checkpoint goes with."),
    ] = None,
    decoder: Annotated[
        Path | None,
        typer.Option(help="Folder of the text model that changes are of, else fetched."),
    ] = None,
    allow_pickle: Annotated[
        bool,
        typer.Option("--allow-pickle", help="Read tensors, and nothing else, from .bin files."),
    ] = False,
) -> None:
    """Make a stock LLaVA of an authors' checkpoint, and planner's files of what else it holds.

    planner run --model DIR runs it; AdaLLaVA's with --scheduler DIR.
    """
    with console.status() as update:
        update("convert")
        done = _converted(source, output, vision_tower, decoder, allow_pickle)

    def summary() -> None:
        beside = "scheduler" if done.layout.startswith("adallava") else "predictors"
        added = f" and a {beside} of {amount(done.added, 'count')}" if done.added else ""
        print(f"{done.layout}: {amount(done.parameters, 'count')} parameters{added}")
        if done.selector:
            print(f"note: it was trained with --tokens {done.selector}")
        print(f"wrote {done.folder}")

    console.show({**asdict(done), "folder": str(done.folder)}, summary)


def _converted(
    source: Path,
    output: Path,
    vision_tower: Path | None,
    decoder: Path | None,
    allow_pickle: bool,
) -> Converted:
    """By the kind of folder that it is."""
    from planner.models.conversion import Converted, convert
    from planner.planning.catalog import CHANGES, shipped_folder

    if str(source) in CHANGES:
        source = shipped_folder(str(source))
    if not (source / "joined.json").is_file():
        if decoder is not None:
            raise InputError("--decoder is for changes of a joined LLaVA")
        return convert(source, output, vision_tower, allow_pickle)
    if vision_tower is not None:
        raise InputError("changes of a joined LLaVA name the model whose vision tower they go with")
    from planner.training.joined_llava import rebuilt
    from planner.training.tiny_llava import export as export_half

    check_new(output)
    model, processor = rebuilt(source, decoder)
    export_half(model, processor, output_folder(output))
    return Converted(output, "joined-llava", sum(p.numel() for p in model.parameters()), 0, "")

"""The table of commands."""

from __future__ import annotations

from importlib import import_module
from typing import Annotated

import typer

from planner import __version__

# In the order of ``planner --help``; each is the function ``<name>_command`` of a module.
COMMANDS = (
    "compile", "inspect", "models", "devices", "run", "serve", "bench", "calibrate",
    "calibrate-utilities", "export", "convert", "heal", "kernels", "train", "eval", "experiment",
    "labels", "audit",
)  # fmt: skip

app = typer.Typer(
    name="planner",
    help="A compiler for adaptive multimodal inference.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> None:
    if asked:
        print(f"planner {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """A compiler for adaptive multimodal inference."""


for _command in COMMANDS:
    _module = _command.replace("-", "_")
    _made = getattr(import_module(f"planner.cli.{_module}"), f"{_module}_command")
    app.command(_command)(_made)

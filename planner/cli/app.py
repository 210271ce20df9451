"""The table of commands."""

from __future__ import annotations

from typing import Annotated

import typer

from planner import __version__
from planner.cli.audit import audit_command
from planner.cli.bench import bench_command
from planner.cli.calibrate import calibrate_command
from planner.cli.calibrate_utilities import calibrate_utilities_command
from planner.cli.compile import compile_command
from planner.cli.convert import convert_command
from planner.cli.devices import devices_command
from planner.cli.eval import eval_command
from planner.cli.experiment import experiment_command
from planner.cli.export import export_command
from planner.cli.heal import heal_command
from planner.cli.inspect import inspect_command
from planner.cli.kernels import kernels_command
from planner.cli.labels import labels_command
from planner.cli.models import models_command
from planner.cli.run import run_command
from planner.cli.serve import serve_command
from planner.cli.train import train_command

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


app.command("compile")(compile_command)
app.command("inspect")(inspect_command)
app.command("models")(models_command)
app.command("devices")(devices_command)
app.command("run")(run_command)
app.command("serve")(serve_command)
app.command("bench")(bench_command)
app.command("calibrate")(calibrate_command)
app.command("calibrate-utilities")(calibrate_utilities_command)
app.command("export")(export_command)
app.command("convert")(convert_command)
app.command("heal")(heal_command)
app.command("kernels")(kernels_command)
app.command("train")(train_command)
app.command("eval")(eval_command)
app.command("experiment")(experiment_command)
app.command("labels")(labels_command)
app.command("audit")(audit_command)

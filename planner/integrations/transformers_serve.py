"""transformers serve with a planned model.

    python -m planner.integrations.transformers_serve FOLDER --budget 0.65 --port 8000

All other options are those of ``transformers serve``. Its continuous batching is refused: its paged
cache holds the same tokens in every layer, and a plan's does not. `planner serve` batches.
"""

from __future__ import annotations

import sys
from typing import Annotated, Any

import typer
from transformers.cli.serve import Serve
from transformers.cli.serving import model_manager

import planner
from planner.ir.errors import InputError


class PlannedModelManager(model_manager.ModelManager):  # type: ignore[misc]
    """Compiles every model that it loads; `options` are those of `planner.compile`."""

    options: dict[str, Any] = {}

    def _load_model(self, model_id_and_revision: str, **arguments: Any) -> Any:
        model = super()._load_model(model_id_and_revision, **arguments)
        processor = self._load_processor(model_id_and_revision)
        return planner.compile(model, processor=processor, **self.options)


def serve(
    context: typer.Context,
    budget: Annotated[str, typer.Option(help="As for planner compile.")] = "0.65",
    utilities: Annotated[str, typer.Option(help="As for planner compile.")] = "auto",
    tokens: Annotated[str | None, typer.Option(help="As for planner compile.")] = None,
) -> None:
    """Serve a model under a budget by transformers' own server."""
    if "--continuous-batching" in context.args:
        raise InputError("a plan's cache cannot be paged: leave out --continuous-batching")
    PlannedModelManager.options = {"budget": budget, "utilities": utilities, "tokens": tokens}
    model_manager.ModelManager = PlannedModelManager
    app = typer.Typer(add_completion=False)
    app.command()(Serve)
    app(context.args)


def main() -> None:
    """The command; bad input is one sentence and exit code 2."""
    app = typer.Typer(add_completion=False)
    foreign = {"allow_extra_args": True, "ignore_unknown_options": True}
    app.command(context_settings=foreign, add_help_option=False)(serve)
    try:
        app(prog_name="planner.integrations.transformers_serve")
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()

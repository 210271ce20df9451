"""``planner models``: aliases, and what of transformers' image-text models can be lowered."""

from __future__ import annotations

import sys
import time
from typing import Annotated, Any

import typer

from planner.cli.command_options import command
from planner.cli.console import Console, say, table


@command()
def models_command(
    console: Console,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Lower every image-text-to-text architecture that transformers maps."
        ),
    ] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", help="With --check: just these model types.")
    ] = None,
) -> None:
    """List model aliases; with --check, what can be lowered."""
    from planner.planning.catalog import ALIASES

    if not check:
        known = {
            name: f"{a.about} ({a.hub_id})" if a.hub_id else a.about for name, a in ALIASES.items()
        }
        console.show({"aliases": known}, lambda: table(["alias", "model"], list(known.items())))
        return
    results = check_models(only, console.shows_progress)
    console.show({"models": results}, lambda: _print_checks(results, console.verbose))


def _print_checks(results: list[dict[str, Any]], verbose: bool) -> None:
    lowered = [r for r in results if r["lowered"]]
    with_sites = [r for r in lowered if r["sites"]]
    rows = [
        [
            r["model_type"],
            "yes" if r["lowered"] else "no",
            str(r["sites"]),
            r["reason"] if verbose else r["reason"][:110],
        ]
        for r in results
    ]
    table(["model type", "lowered", "sites", "remarks"], rows)
    print(f"\n{len(lowered)} of {len(results)} lowered, {len(with_sites)} with sites")


def check_models(only: list[str] | None, show: bool) -> list[dict[str, Any]]:
    """Lower the default config of every architecture, verify it and read its text form back."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as NAMES,
    )

    from planner.ir.errors import InputError

    unknown = sorted(set(only or ()) - set(NAMES))
    if unknown:
        raise InputError(f"transformers maps no image-text model type '{unknown[0]}'")
    chosen = [name for name in NAMES if not only or name in only]
    results = []
    started = time.perf_counter()
    for index, name in enumerate(chosen):
        if show and time.perf_counter() - started > 2:
            end = "\r" if sys.stderr.isatty() else "\n"
            sys.stderr.write(f"{index + 1}/{len(chosen)} {name:<30}{end}")
        results.append(check_model(name))
    if show and sys.stderr.isatty():
        say(" " * 50)
    return results


def check_model(model_type: str) -> dict[str, Any]:
    """Lower one architecture's default config; ``{"model_type", "lowered", "sites", "reason"}``."""
    from transformers import CONFIG_MAPPING

    from planner.ir.errors import InputError
    from planner.ir.graph_text import parse_graph, print_graph
    from planner.ir.lowering import lower_config
    from planner.ir.verify import verify

    result: dict[str, Any] = {"model_type": model_type, "lowered": False, "sites": 0, "reason": ""}
    try:
        lowered = lower_config(CONFIG_MAPPING[model_type](), model_type)
        verify(lowered.graph)
        text = print_graph(lowered.graph)
        if print_graph(parse_graph(text)) != text:
            raise InputError("its text form does not read back")
    except Exception as error:
        lines = str(error).strip().splitlines()
        known = isinstance(error, InputError)
        result["reason"] = lines[0] if known and lines else f"{type(error).__name__}: {error}"[:200]
        return result
    result["lowered"] = True
    result["sites"] = len(lowered.graph.sites)
    result["reason"] = "; ".join(lowered.notes)
    return result

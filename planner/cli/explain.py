"""What `planner run` says of a plan: what it leaves out, and layer by layer what is kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from planner.cli.console import table
from planner.ir.intervals import print_ranges
from planner.planning.selectors import selector_of

if TYPE_CHECKING:
    from planner.ir.graph import Graph
    from planner.models.scheduling import Scheduled
    from planner.plan import Plan

_KINDS = {"heads": "heads", "mlp": "MLP groups"}


def skipped(plan: Plan, graph: Graph, image_tokens: int, kept: Mapping[int, int]) -> dict[str, str]:
    """What a plan for a graph leaves out, in words.

    `kept`: layer of a token stage -> image tokens that were really left, where that is known.
    """
    gone: dict[str, str] = {}
    if plan.layers_off:
        gone["layers"] = f"{len(plan.layers_off)} of {plan.layers}"
    for kind, what in _KINDS.items():
        sites = [site for site in graph.sites_of(kind) if site.layer not in plan.layers_off]
        narrowed = sum(not plan.kept(site).everything for site in sites)
        if narrowed:
            gone[f"{what} in layers"] = f"{narrowed} of {plan.layers}"
    for stage in plan.tokens:
        left = kept.get(stage.layer, round(image_tokens * stage.keep / stage.of))
        gone[f"image tokens before layer {stage.layer}"] = (
            f"{image_tokens - left} of {image_tokens}"
        )
    if plan.kv:
        gone["cache entries by"] = plan.kv
    return gone


def layer_rows(
    plan: Plan, graph: Graph, kept: Mapping[int, int], scheduled: Scheduled | None = None
) -> list[dict[str, Any]]:
    """Layer by layer: what is kept of it, and the scheduler's logits for it where there is one.

    `kept`: layer of a token stage -> image tokens that were really left, where that is known.
    """
    scores = _scores(scheduled) if scheduled is not None else {}
    rows = []
    for layer in range(plan.layers):
        row: dict[str, Any] = {"layer": layer, "on": layer not in plan.layers_off}
        for kind in _KINDS:
            site = graph.sites_by_name.get(f"{kind}.{layer}")
            if site is not None:
                of_site = plan.kept(site)
                row[kind], row[f"{kind}_of"] = list(of_site.switches), of_site.of
        stages = [stage for stage in plan.tokens if stage.layer <= layer]
        if stages:
            last = stages[-1]
            left = kept.get(last.layer, last.keep)
            most = "" if left == last.keep else f", planned {last.keep}"
            # A cap is all that is known where nobody counted.
            unknown = last.layer not in kept and selector_of(last).is_adaptive
            least = "at most " if unknown else ""
            row["image_tokens"] = f"{least}{left} of {last.of}{most} ({last.selector})"
        if layer in scores:
            row["logits"] = scores[layer]
        rows.append(row)
    return rows


def _scores(scheduled: Scheduled) -> dict[int, list[float]]:
    """Layer -> the scheduler's logits for its switches, for the first sample."""
    if scheduled.logits is None:
        return {}
    row = [round(x, 3) for x in scheduled.logits[0].detach().tolist()]
    return {layer: row[columns.all] for layer, columns in scheduled.layout.columns.items()}


def print_layers(rows: list[dict[str, Any]]) -> None:
    """The rows of `layer_rows` as a table."""

    def cell(row: dict[str, Any], column: str) -> str:
        value = row.get(column, "")
        if column in _KINDS and column in row:
            return "all" if len(value) == row[f"{column}_of"] else print_ranges(value)
        if column == "logits" and value:
            shown = [f"{x:+.2f}" for x in value]
            return shown[0] if len(shown) == 1 else f"{min(value):+.2f} to {max(value):+.2f}"
        return str(value)

    names = {kind: f"{what} kept" for kind, what in _KINDS.items()}
    names |= {"image_tokens": "image tokens", "logits": "logits"}
    columns = [column for column in names if any(column in row for row in rows)]
    table(
        ["layer", "runs", *(names[column] for column in columns)],
        [
            [str(row["layer"]), "yes" if row["on"] else "no", *(cell(row, c) for c in columns)]
            for row in rows
        ],
    )

"""``planner inspect``: what every operator of a model costs, dense or under a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from planner.cli.command_options import command
from planner.cli.console import Console, amount, table

if TYPE_CHECKING:
    from planner.ir.cost import Cost
    from planner.ir.graph import Operator
    from planner.planning.compiler import Request


@command(
    "model", "device", "image_tokens", "text_tokens", "new_tokens", "batch", "trust_remote_code"
)
def inspect_command(
    request: Request,
    console: Console,
    plan: Annotated[Path | None, typer.Option("--plan", help="A plan to apply first.")] = None,
    passes: Annotated[
        str, typer.Option("--passes", help="Passes to apply, such as drop-dead,fuse-projections.")
    ] = "",
    by: Annotated[str, typer.Option("--by", help="Rows: operator, layer or kind.")] = "layer",
    step: Annotated[
        str, typer.Option("--step", help="What runs: prefill, or decode (the last token).")
    ] = "prefill",
    graph_text: Annotated[
        bool, typer.Option("--graph", help="Print the graph's text form instead.")
    ] = False,
) -> None:
    """Show the cost of a model: FLOPs, bytes, roofline seconds, KV bytes, parameters."""
    from planner.ir.cost import price, total
    from planner.ir.cost.device_table import device as find_device
    from planner.ir.errors import InputError
    from planner.ir.graph_text import print_graph
    from planner.ir.passes import find_passes, run
    from planner.plan import load_plan
    from planner.planning.catalog import find_model
    from planner.planning.compiler import DEFAULT_DEVICE, lowered_graph, specialised
    from planner.planning.figures import check_figures

    if by not in ("operator", "layer", "kind"):
        raise InputError(f"unknown --by '{by}': choose operator, layer or kind")
    if step not in ("prefill", "decode"):
        raise InputError(f"unknown --step '{step}': choose prefill or decode")
    chip = find_device(request.device or DEFAULT_DEVICE)
    loaded = load_plan(plan) if plan else None
    rewrites = find_passes(passes)
    with console.status() as update:
        update("lower")
        graph, _, _ = lowered_graph(find_model(request.model, request.trust_remote_code))
    load = request.workload(graph)
    kept: dict[int, int] = {}
    if loaded is not None:
        check_figures(loaded, graph)
        graph = specialised(graph, loaded)
        kept = {stage.layer: min(stage.keep, load.image_tokens) for stage in loaded.tokens}
    graph = run(graph, rewrites)
    last = max(1, request.new_tokens)
    sizes = load.prefill(kept) if step == "prefill" else load.decode(last, kept)
    costs = [(operator, price(operator, graph, sizes, chip)) for operator in graph]
    whole = total(cost for _, cost in costs)
    document = {
        "model": graph.name,
        "device": chip.name,
        "step": step,
        "totals": _facts(whole),
        "operators": [_row(operator, cost) for operator, cost in costs],
    }

    def text() -> None:
        if graph_text:
            by_name = {operator.name: cost for operator, cost in costs}
            print(print_graph(graph, lambda o: amount(by_name[o.name].flops, "flops")), end="")
        else:
            _print(graph.name, chip.name, step, costs, whole, by)

    console.show(document, text)


def _facts(cost: Cost) -> dict[str, Any]:
    return {
        "flops": cost.flops,
        "bytes": cost.bytes,
        "seconds": cost.seconds,
        "kv_bytes": cost.kv_bytes,
        "parameters": cost.parameters,
    }


def _row(operator: Operator, cost: Cost) -> dict[str, Any]:
    return {
        "name": operator.name,
        "kind": operator.kind,
        "part": operator.part,
        "layer": operator.layer,
        **_facts(cost),
        "bound": cost.bound,
    }


def _print(
    name: str,
    device: str,
    step: str,
    costs: list[tuple[Operator, Cost]],
    whole: Cost,
    by: str,
) -> None:
    from planner.ir.cost import total

    groups: dict[str, list[Cost]] = {}
    for operator, cost in costs:
        if by == "operator":
            key = operator.name
        elif by == "kind":
            key = operator.kind
        else:
            layer = "" if operator.layer is None else f" {operator.layer}"
            key = f"{operator.part}{layer}"
        groups.setdefault(key, []).append(cost)
    rows = []
    for key, members in [*groups.items(), ("total", [whole])]:
        cost = total(members) if key != "total" else whole
        share = cost.seconds / whole.seconds if whole.seconds else 0.0
        rows.append(
            [
                key,
                amount(cost.flops, "flops"),
                amount(cost.bytes, "bytes"),
                amount(cost.seconds, "latency"),
                f"{share:.1%}",
                amount(cost.kv_bytes, "bytes"),
                amount(cost.parameters, "count"),
                cost.bound,
            ]
        )
    title = f"{name}, {step}, modelled on {device} (roofline: no overlap, no launch cost)"
    table([by, "FLOPs", "moved", "time", "share", "KV", "parameters", "bound"], rows, title)

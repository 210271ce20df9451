"""``planner inspect``: what every operator of a model costs, dense or under a plan."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from planner.cli.command_options import Convention, command
from planner.cli.console import Console, amount, table
from planner.planning.request import Request

if TYPE_CHECKING:
    from planner.ir.cost import Cost
    from planner.ir.graph import Operator


@command(
    "model", "device", "image_tokens", "text_tokens", "new_tokens", "batch", "trust_remote_code"
)
def inspect_command(
    request: Request,
    console: Console,
    plan: Annotated[Path | None, typer.Option(help="A plan to apply first.")] = None,
    passes: Annotated[
        str, typer.Option(help="Passes to apply, such as drop-dead,fuse-projections.")
    ] = "",
    by: Annotated[
        Literal["operator", "layer", "kind"], typer.Option(help="What a row is of.")
    ] = "layer",
    step: Annotated[
        Literal["prefill", "decode"],
        typer.Option(help="What runs: prefill, or decode (the last token)."),
    ] = "prefill",
    convention: Convention = "planner",
    projector: Annotated[
        str,
        typer.Option(help="Another projector on a LLaVA, such as token-packer:2."),
    ] = "",
    graph_text: Annotated[
        bool, typer.Option("--graph", help="Print the graph's text form instead.")
    ] = False,
) -> None:
    """Show the cost of a model: FLOPs, bytes, roofline seconds, KV bytes, parameters."""
    from dataclasses import replace

    from planner.ir.cost import price, total
    from planner.ir.cost.conventions import convention as find_convention
    from planner.ir.errors import InputError
    from planner.ir.graph import Operator
    from planner.ir.graph_text import print_graph
    from planner.ir.passes import find_passes, run
    from planner.plan import load_plan
    from planner.planning.catalog import find_model
    from planner.planning.compiler import find_device, specialised
    from planner.planning.figures import check_figures
    from planner.planning.graph_cache import lowered_graph

    how = None if convention == "planner" else find_convention(convention)
    if how is not None and graph_text:
        raise InputError("--graph shows planner's own costs: give it without --convention")
    chip = find_device(request.device)
    loaded = load_plan(plan) if plan else None
    rewrites = find_passes(passes)
    with console.status() as update:
        update("lower")
        source = find_model(request.model, request.trust_remote_code)
        if projector:
            from planner.models.projectors import projected_source

            source = projected_source(source, projector)
        graph, _, _ = lowered_graph(source)
    chip = chip.on(graph)
    load = request.workload(graph)
    kept: dict[int, int] = {}
    if loaded is not None:
        check_figures(loaded, graph)
        graph = specialised(graph, loaded)
        kept = {stage.layer: min(stage.keep, load.image_tokens) for stage in loaded.tokens}
    graph = run(graph, rewrites)
    last = max(1, request.new_tokens)
    if how is None:
        sizes = load.prefill(kept) if step == "prefill" else load.decode(last, kept)
        costs = [(operator, price(operator, graph, sizes, chip)) for operator in graph]
        beside = chip.pass_seconds(graph.dtype_bytes, sizes)
    else:
        beside, decodes = 0.0, step == "decode"
        tokens = how.tokens(graph, load, kept, last if decodes else 0)
        costs = [
            (
                Operator(row.name, row.name.rpartition(".")[2], layer=row.layer)
                if row.layer is not None
                else Operator(row.name, "linear", part="head"),
                row.cost(chip if how.has_seconds else None, load.batch),
            )
            for row in how.rows(graph, tokens, decodes)
        ]
    whole = total(cost for _, cost in costs)
    whole = replace(whole, seconds=whole.seconds + beside)
    document = {
        "model": graph.name,
        "device": chip.name,
        "step": step,
        "convention": convention,
        "image_tokens": load.image_tokens,
        "totals": {name: getattr(whole, name) for name in _COSTS},
        "operators": [
            {name: getattr(operator, name) for name in ("name", "kind", "part", "layer")}
            | {name: getattr(cost, name) for name in (*_COSTS, "bound")}
            for operator, cost in costs
        ],
    }

    def text() -> None:
        if graph_text:
            by_name = {operator.name: cost for operator, cost in costs}
            print(print_graph(graph, lambda o: amount(by_name[o.name].flops, "flops")), end="")
        else:
            rule = (
                f"as measured in {chip.name}, {amount(beside, 'latency')} besides the operators"
                if beside
                else f"modelled on {chip.name} (roofline: no overlap, no launch cost)"
                if how is None
                else f"modelled on {chip.name} (as {convention})"
            )
            _print(f"{graph.name}, {step}, {rule}", costs, whole, by)

    console.show(document, text)


# Fields of a `Cost` that are shown.
_COSTS = ("flops", "bytes", "seconds", "kv_bytes", "parameters")


def _print(title: str, costs: list[tuple[Operator, Cost]], whole: Cost, by: str) -> None:
    from planner.ir.cost import total

    groups: dict[str, list[Cost]] = {}
    for operator, cost in costs:
        layer = "" if operator.layer is None else f" {operator.layer}"
        key = {"operator": operator.name, "kind": operator.kind}.get(by, f"{operator.part}{layer}")
        groups.setdefault(key, []).append(cost)
    rows = []
    for key, cost in [*((key, total(some)) for key, some in groups.items()), ("total", whole)]:
        share = cost.seconds / whole.seconds if whole.seconds else 0.0
        work = [amount(cost.flops, "flops"), amount(cost.bytes, "bytes")]
        time = [amount(cost.seconds, "latency"), f"{share:.1%}"]
        stored = [amount(cost.kv_bytes, "bytes"), amount(cost.parameters, "count")]
        rows.append([key, *work, *time, *stored, cost.bound])
    table([by, "FLOPs", "moved", "time", "share", "KV", "parameters", "bound"], rows, title)

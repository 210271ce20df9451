"""What lowering and passes ask of a Graph's structure, and the rewrites that passes share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace

import networkx as nx

from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator, Site

__all__ = ["exit_of", "needed", "outputs", "redirected", "residual_entry", "within"]


def outputs(graph: Graph) -> tuple[str, ...]:
    """The operators that the model is run for: its head, or the last one of a model without."""
    head = tuple(operator.name for operator in graph if operator.part == "head")
    return head or tuple(operator.name for operator in graph.operators[-1:])


def needed(graph: Graph) -> set[str]:
    """Names of the operators that some output depends on."""
    names = set(outputs(graph))
    for name in outputs(graph):
        names |= nx.ancestors(graph.network, name)
    return names


def redirected(operators: Iterable[Operator], names: Mapping[str, str]) -> list[Operator]:
    """Operators that read ``names[x]`` where they read x."""
    return [
        replace(o, inputs=tuple(dict.fromkeys(names.get(i, i) for i in o.inputs)))
        if any(i in names for i in o.inputs)
        else o
        for o in operators
    ]


def within(graph: Graph, site: Site) -> set[str]:
    """Names of the operators inside a site's module."""
    inside = site.module + "."
    return {o.name for o in graph if o.module == site.module or o.module.startswith(inside)}


def exit_of(graph: Graph, site: Site, inside: set[str]) -> str:
    """The one operator of a layer that others read.

    Raises:
        InputError: where there are several, so that the layer cannot be left out.
    """
    network = graph.network
    read = sorted(name for name in inside if any(r not in inside for r in network[name]))
    if not read:
        read = [operator.name for operator in graph if operator.name in inside][-1:]
    if len(read) != 1:
        raise InputError(f"{site.name} cannot be left out: others read {', '.join(read)}")
    return read[0]


def residual_entry(graph: Graph, site: Site, inside: set[str], end: str) -> str:
    """The operator whose output the residual stream carries into a layer.

    It is found from the layer's end, backwards through sums and through scaling by a constant.

    Raises:
        InputError: where no such path leads out of the layer.
    """
    known = graph.by_name
    pending, entries = [end], []
    while pending:
        operator = known[pending.pop()]
        scaling = operator.kind == "multiply" and len(operator.inputs) == 1
        if operator.kind == "add" or scaling:
            pending += [name for name in operator.inputs if name in inside]
            entries += [name for name in operator.inputs if name not in inside]
    fitting = {name for name in entries if known[name].shape == known[end].shape}
    if len(fitting) != 1:
        raise InputError(f"{site.name} cannot be left out: no residual path leads through it")
    return fitting.pop()

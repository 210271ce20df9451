"""Layers that vanish with their attention and their MLP: nothing else adds to the stream."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.ir.structure import exit_of, residual_entry, within


def vanishes(graph: Graph, layer: Site, inner: Collection[str], module: nn.Module) -> bool:
    """Whether a layer puts out what it is given where the last linears of some sites give zeros.

    Not so where something makes a value of zeros, such as a norm with a bias; where experts beside
    a shared MLP, or attention that the Graph does not know, add something too; or where the stream
    itself is scaled.
    """
    inside = within(graph, layer)
    try:
        end = exit_of(graph, layer, inside)
        entry = residual_entry(graph, layer, inside, end)
    except InputError:
        return False
    zeros: set[str] = set()
    stream = {entry}
    for operator in graph:
        name, given = operator.name, {*operator.inputs}
        if name not in inside:
            continue
        sinks = any(axis == "in" and site in inner for axis, site in operator.narrowed_by)
        # A product with zeros is zero; what is added or normalised has to be zero as a whole.
        whole = operator.kind == "add" or (operator.kind == "norm" and not operator.get("bias", 0))
        multiplied = operator.kind == "multiply" and bool(given & zeros)
        if sinks or multiplied or (whole and given and given <= zeros):
            zeros.add(name)
        elif operator.kind == "add" and given & stream and given <= stream | zeros:
            stream.add(name)
    return end in stream and _knows_all(graph, layer, module)


def _knows_all(graph: Graph, layer: Site, module: nn.Module) -> bool:
    """Whether every parameter inside a layer belongs to a module of the Graph."""
    known = {operator.module for operator in graph}
    linears = tuple(f"{operator.module}." for operator in graph if operator.kind == "linear")
    paths = (
        f"{layer.module}.{path}" for path, inner in module.named_modules() if inner._parameters
    )
    return all(path in known or path.startswith(linears) for path in paths)

"""Peak memory of one step: parameters, KV cache, and the activations alive at the worst moment."""

from __future__ import annotations

from collections.abc import Mapping

from planner.ir.cost.price import operator_parameters
from planner.ir.dims import Sizes
from planner.ir.graph import Graph, Operator
from planner.ir.kinds import attended_keys, kind_of
from planner.ir.kinds.table import SINGLE_PRECISION


def peak_bytes(graph: Graph, sizes: Sizes) -> int:
    """Bytes that a step needs at its worst moment, at most.

    Parameters, the KV cache as the step leaves it, one layer's share of the cache again (stock
    caches grow by copying), masks, tables of rotations and `activation_bytes`. Attention is fused:
    a matrix of scores is not counted. Nor are the allocator's gaps, the device's context, the
    pixels, or hidden states that a caller asks to be given.
    """
    element = graph.dtype_bytes
    parameters = sum(operator_parameters(operator) for operator in graph)
    cached = [kind_of(operator).cached(operator, sizes) for operator in graph]
    cache = sum(cached) + max(cached, default=0)
    held = (parameters + cache) * element + _shared_bytes(graph, sizes)
    return held + activation_bytes(graph, sizes)


def _shared_bytes(graph: Graph, sizes: Sizes) -> int:
    """Bytes of what a decoder prepares once for all its layers: masks, and tables of rotations.

    A mask holds an element per query and key, and there is one for each window; the tables hold
    cosines and sines in single precision.
    """
    element = graph.dtype_bytes
    masks: dict[int, int] = {}
    tables = 0
    for operator in graph:
        if operator.kind == "attention" and operator.part == "decoder":
            rows = sizes["batch"] * operator.shape[-2].evaluate(sizes)
            mask = rows * attended_keys(operator, sizes) * element
            window = operator.get("window", 0)
            masks[window] = max(masks.get(window, 0), mask)
            table = rows * operator.integer("head_dim") * 2 * SINGLE_PRECISION
            tables = max(tables, table)
    return sum(masks.values()) + tables * len(masks)


def activation_bytes(graph: Graph, sizes: Sizes) -> int:
    """Bytes of the activations that are alive at the worst moment of a step.

    An activation lives until its last reader is done, and longer where it was the argument of a
    module's call: the caller's frame holds it until the call returns.
    """
    element = graph.dtype_bytes
    order = {operator.name: position for position, operator in enumerate(graph)}
    released = _released(graph, order)
    freed: dict[int, int] = {}
    alive = worst = 0
    for position, operator in enumerate(graph):
        elements = operator.elements(sizes)
        alive += elements * element
        held = kind_of(operator).held_bytes(operator, element)
        worst = max(worst, alive + elements * held)
        end = released[operator.name]
        freed[end] = freed.get(end, 0) + elements * element
        alive -= freed.pop(position, 0)
    return worst


def _released(graph: Graph, order: Mapping[str, int]) -> dict[str, int]:
    """Operator -> position of the last operator during which its output is alive."""
    returns: dict[str, int] = {}
    for position, operator in enumerate(graph):
        for module in _callers(operator.module):
            returns[module] = position
    released = dict(order)
    for operator in graph:
        for name in operator.inputs:
            if name in order:
                call = _call(graph.by_name[name], operator)
                end = max(order[operator.name], returns.get(call, 0))
                released[name] = max(released[name], end)
    return released


def _callers(module: str) -> list[str]:
    """A module path and every path above it."""
    parts = module.split(".")
    return [".".join(parts[: depth + 1]) for depth in range(len(parts))] if module else []


def _call(source: Operator, reader: Operator) -> str:
    """The outermost module that a value is given to on its way from one operator to another."""
    above = set(_callers(source.module))
    return next((module for module in _callers(reader.module) if module not in above), "")

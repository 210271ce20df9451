"""The price of an operator, and of a whole Graph.

Seconds are a roofline: an operator takes ``max(operations / peak, bytes / bandwidth)``. Operators
follow one another, each reads its inputs from memory and writes its output there, nothing overlaps
and launches are free. The price also says which of the two terms bounds the operator.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields

from planner.ir.cost.device_table import Device
from planner.ir.cost.flops import (
    attended_keys,
    operator_flops,
    operator_kv_elements,
    operator_parameters,
    operator_weights,
    tokens_scored,
)
from planner.ir.dims import product
from planner.ir.graph import Graph, Operator

__all__ = ["Cost", "price", "roofline", "total"]

# Work per element of the output where no matrices are multiplied, for the roofline only: these
# operations are not FLOPs in the sense of `planner.ir.cost.flops`.
_LIGHT_OPERATIONS = {
    "norm": 7,
    "softmax": 5,
    "rotary": 3,
    "activation": 4,
    "multiply": 1,
    "add": 1,
    "elementwise": 1,
    "reduce": 1,
}
_LINEAR = frozenset(["linear", "fused_linear", "norm_linear", "experts"])
_COPIES = frozenset(["embedding", "gather"])
_ELEMENTWISE = frozenset(
    ["norm", "softmax", "rotary", "activation", "multiply", "add", "elementwise"]
)


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operator, or many, cost.

    Attributes:
        flops: multiply-adds times two.
        bytes: read and written: weights, inputs, output.
        seconds: roofline time; 0 without a device.
        kv_bytes: what stays in the KV cache.
        parameters: what the operator adds to the model's parameters, whether it runs or not.
        output_bytes: size of the output.
        bound: ``compute``, ``memory`` or ``-`` (takes no time, or no device was given).
    """

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    kv_bytes: int = 0
    parameters: int = 0
    output_bytes: int = 0
    bound: str = "-"


def roofline(operations: int, moved_bytes: int, device: Device) -> tuple[float, str]:
    """Seconds and what bounds them: ``compute``, ``memory`` or ``-`` where nothing is done."""
    compute = operations / device.operations_per_second
    memory = moved_bytes / device.bytes_per_second
    if not compute and not memory:
        return 0.0, "-"
    return (compute, "compute") if compute > memory else (memory, "memory")


def _weights_read(operator: Operator, rows: int) -> int:
    """Elements of the weights that are read for the given number of rows."""
    if operator.kind == "embedding":
        return 0  # the rows of the table are counted as its input
    weights = operator_weights(operator)
    if operator.kind == "experts":
        # Each row is routed to one expert: few rows leave most experts untouched.
        experts = operator.integer("experts")
        return weights // experts * min(experts, rows)
    return weights


def _inputs_read(operator: Operator, graph: Graph, sizes: Mapping[str, int], output: int) -> int:
    """Elements of the activations that are read."""
    kind = operator.kind
    if kind in _LINEAR:
        return product(operator.shape[:-1], sizes) * operator.integer("in")
    if kind == "attention":
        return _attention_inputs(operator, sizes)
    if kind in _COPIES:
        return output
    if kind == "select_tokens":
        return output + tokens_scored(operator, sizes) * operator.integer("score_width")
    read = [product(graph.by_name[i].shape, sizes) for i in operator.inputs if i in graph.by_name]
    if kind in _ELEMENTWISE:
        # A slice of a wider value (the gate of a fused projection) is all that is read of it.
        return sum(min(elements, output) for elements in read)
    return sum(read)


def _attention_inputs(operator: Operator, sizes: Mapping[str, int]) -> int:
    """Queries, and the keys and values once per KV head, however many queries share them."""
    *samples, heads, queries, value_dim = (dim.evaluate(sizes) for dim in operator.shape)
    head_dim = operator.integer("head_dim")
    keys = attended_keys(operator, sizes) * operator.integer("kv_heads")
    return math.prod(samples) * (heads * queries * head_dim + keys * (head_dim + value_dim))


def price(
    operator: Operator,
    graph: Graph,
    sizes: Mapping[str, int],
    device: Device | None = None,
) -> Cost:
    """Cost of one operator.

    Args:
        operator: an operator of `graph`.
        graph: where the sizes of its inputs and of an element are looked up.
        sizes: size of every symbol (`Workload.prefill` or `Workload.decode`).
        device: for seconds.
    """
    parameters = operator_parameters(operator)
    output = product(operator.shape, sizes)
    idle = operator.kind == "select_tokens" and not tokens_scored(operator, sizes)
    if output == 0 or idle or operator.kind == "input":
        return Cost(parameters=parameters)
    element = int(graph.properties.get("dtype_bytes", 2))
    flops = operator_flops(operator, sizes)
    rows = product(operator.shape[:-1], sizes)
    moved = _weights_read(operator, rows) + _inputs_read(operator, graph, sizes, output) + output
    moved_bytes = moved * element
    seconds, bound = 0.0, "-"
    if device is not None:
        work = flops or _LIGHT_OPERATIONS.get(operator.kind, 0) * output
        seconds, bound = roofline(work, moved_bytes, device)
    return Cost(
        flops=flops,
        bytes=moved_bytes,
        seconds=seconds,
        kv_bytes=operator_kv_elements(operator, sizes) * element,
        parameters=parameters,
        output_bytes=output * element,
        bound=bound,
    )


_SUMMED = tuple(f.name for f in fields(Cost) if f.name not in ("bound", "seconds"))


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of costs; `bound` is where most of the seconds go."""
    costs = list(costs)
    seconds = math.fsum(cost.seconds for cost in costs)
    by_bound: dict[str, float] = {}
    for cost in costs:
        by_bound[cost.bound] = by_bound.get(cost.bound, 0.0) + cost.seconds
    sums = {name: sum(getattr(cost, name) for cost in costs) for name in _SUMMED}
    bound = max(by_bound, key=lambda b: by_bound[b]) if seconds else "-"
    return Cost(seconds=seconds, bound=bound, **sums)

"""The price of an operator, and of a whole Graph.

Seconds are a roofline: an operator takes ``max(operations / peak, bytes / bandwidth)``, operators
follow one another, nothing overlaps and launches are free. It is a lower bound on real time, and it
says which of the two bounds.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from enum import Enum

from planner.ir.cost.devices import Device
from planner.ir.cost.flops import operator_flops, operator_kv_elements, operator_parameters
from planner.ir.dims import Dim, product
from planner.ir.graph import Graph, Operator

__all__ = ["Cost", "Step", "price", "total"]

# Work per element of operators that multiply no matrices, for the roofline only: these operations
# are not FLOPs in the sense of `planner.ir.cost.flops`.
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


class Step(Enum):
    """What runs: the whole prompt, or one generated token."""

    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operator, or many, cost.

    Attributes:
        flops: multiply-adds times two.
        bytes: read and written: weights, inputs, output.
        seconds: roofline time; 0 without a device.
        kv_bytes: what stays in the KV cache.
        parameters: weights read.
        output_bytes: size of the output.
        bound: ``compute``, ``memory`` or ``-`` (costs nothing).
    """

    flops: int = 0
    bytes: int = 0
    seconds: float = 0.0
    kv_bytes: int = 0
    parameters: int = 0
    output_bytes: int = 0
    bound: str = "-"


def _input_elements(operator: Operator, graph: Graph, sizes: Mapping[str, int]) -> int:
    if operator.kind == "attention":
        keys = Dim.of(operator["keys"]).evaluate(sizes)
        rows = product(operator.shape, sizes) // operator.integer("value_dim")
        heads = operator.integer("heads")
        query = rows * operator.integer("head_dim")
        query_tokens = operator.shape[-2].evaluate(sizes)
        samples = rows // max(1, heads * query_tokens)
        width = operator.integer("head_dim") + operator.integer("value_dim")
        return query + samples * keys * operator.integer("kv_heads") * width
    if operator.kind in ("linear", "norm_linear", "fused_linear"):
        return product(operator.shape[:-1], sizes) * operator.integer("in")
    if operator.kind == "embedding":
        return product(operator.shape, sizes)
    if operator.kind == "input":
        return 0
    known = graph.by_name
    return sum(product(known[name].shape, sizes) for name in operator.inputs if name in known)


def price(
    operator: Operator,
    graph: Graph,
    sizes: Mapping[str, int],
    device: Device | None = None,
) -> Cost:
    """Cost of one operator.

    Args:
        operator: an operator of `graph`.
        graph: where the sizes of its inputs are looked up.
        sizes: size of every symbol (`Workload.prefill` or `Workload.decode`).
        device: for seconds.
    """
    element = int(graph.properties.get("dtype_bytes", 2))
    if any(
        symbol in ("images",) and sizes[symbol] == 0 for d in operator.shape for symbol in d.symbols
    ):
        return Cost()
    flops = operator_flops(operator, sizes)
    output = product(operator.shape, sizes)
    parameters = operator_parameters(operator)
    weights = parameters
    if operator.kind == "embedding":
        weights = 0  # a look-up reads just the rows it copies
    elif operator.kind == "experts":
        rows = output // max(1, operator.integer("out"))
        experts = operator.integer("experts")
        weights = parameters // experts * min(experts, rows)
    moved = weights + _input_elements(operator, graph, sizes) + output
    if operator.kind == "input":
        moved = output = 0
    moved_bytes = moved * element
    seconds, bound = 0.0, "-"
    if device is not None and moved_bytes:
        work = flops or _LIGHT_OPERATIONS.get(operator.kind, 0) * output
        compute = work / device.operations_per_second
        memory = moved_bytes / device.bytes_per_second
        seconds, bound = max((compute, "compute"), (memory, "memory"))
    return Cost(
        flops=flops,
        bytes=moved_bytes,
        seconds=seconds,
        kv_bytes=operator_kv_elements(operator, sizes) * element,
        parameters=parameters,
        output_bytes=output * element,
        bound=bound,
    )


def total(costs: Iterable[Cost]) -> Cost:
    """Sum of costs; `bound` is where most of the seconds go."""
    costs = list(costs)
    bounds: dict[str, float] = {}
    for cost in costs:
        bounds[cost.bound] = bounds.get(cost.bound, 0.0) + cost.seconds
    sums = {
        f.name: sum(getattr(c, f.name) for c in costs)
        for f in fields(Cost)
        if f.name not in ("bound", "seconds")
    }
    seconds = math.fsum(c.seconds for c in costs)
    bound = max(bounds, key=lambda b: bounds[b]) if seconds else "-"
    return Cost(seconds=seconds, bound=bound, **sums)

"""The price of an operator, and of a whole Graph.

FLOPs: a multiply-add is two operations, attention is counted in full (not halved for causality),
and only products count: linear layers, attention, convolutions, grouped products. It is what
`torch.utils.flop_counter.FlopCounterMode` counts on the executed model with eager attention, and
agrees with it to the last operation. The formulas are in `planner.ir.kinds`.

Seconds are the device's own where it was measured (`planner.ir.cost.measured_device`), and else a
roofline: an operator takes ``max(operations / peak, bytes / bandwidth)``. Operators follow one
another, each reads its inputs from memory and writes its output there, nothing overlaps and
launches are free.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

from planner.ir.cost.device_table import Device
from planner.ir.dims import Sizes
from planner.ir.graph import Graph, Operator
from planner.ir.kinds import kind_of


@dataclass(frozen=True, slots=True)
class Cost:
    """What one operator, or many, cost."""

    flops: int = 0
    bytes: int = 0  # read and written: weights, inputs, output
    seconds: float = 0.0  # 0 without a device
    kv_bytes: int = 0  # what stays in the KV cache
    parameters: int = 0  # what the operator adds to the model's parameters, whether it runs or not
    bound: str = "-"  # ``compute``, ``memory`` or ``-`` (takes no time, or no device was given)


def operator_flops(operator: Operator, sizes: Sizes) -> int:
    """FLOPs of one operator when the graph's symbols have the given sizes."""
    formula = kind_of(operator).flops
    return formula(operator, sizes) if formula else 0


def operator_parameters(operator: Operator) -> int:
    """Parameters that an operator adds to the model: 0 where it shares another's (a tied lm_head).

    Parameters that are just added to activations (positions, class tokens) are not counted.
    """
    return 0 if operator.get("tied") else kind_of(operator).weights(operator)


def price(operator: Operator, graph: Graph, sizes: Sizes, device: Device | None = None) -> Cost:
    """Cost of one operator of a graph, with seconds where there is a device.

    Sizes are those of every symbol (`Workload.prefill` or `Workload.decode`).
    """
    kind, element = kind_of(operator), graph.dtype_bytes
    parameters = operator_parameters(operator)
    output = operator.elements(sizes)
    if output == 0 or not kind.runs(operator, sizes):
        return Cost(parameters=parameters)
    inputs = (graph.by_name[i].elements(sizes) for i in operator.inputs if i in graph.by_name)
    few = kind.weights_read
    weights = few(operator, sizes) if few else kind.weights(operator)
    moved = weights + kind.inputs_read(operator, sizes, inputs) + output
    flops = operator_flops(operator, sizes)
    seconds, bound = 0.0, "-"
    if device is not None:
        operations = flops or kind.light_operations * output
        seconds, bound = device.time(operator, sizes, operations, moved, element)
    return Cost(
        flops=flops,
        bytes=moved * element,
        seconds=seconds,
        kv_bytes=kind.cached(operator, sizes) * element,
        parameters=parameters,
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

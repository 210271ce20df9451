"""How a Graph's blocks run on kernels: MLPs in one go, linears by units of features."""

from __future__ import annotations

import math
from dataclasses import dataclass

from planner.ir.graph import Binding, Graph, Operator, Site

# The Graph's name of an activation -> the kernels'.
ACTIVATIONS = {
    "silu": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_tanh": "gelu_pytorch_tanh",
    "gelu_new": "gelu_pytorch_tanh",
    "sigmoid": "quick_gelu",
}


class NotFusable(Exception):
    """Why a block is not fused, as the end of a sentence: ``its ...``."""


@dataclass(frozen=True)
class MLPBlock:
    """``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` without a gate; `activation` is one
    of `planner.kernels.ops.project_rows.ACTIVATIONS`."""

    up: Operator
    down: Operator
    gate: Operator | None
    activation: str

    @property
    def linears(self) -> tuple[Operator, ...]:
        """Gate, if there is one, up and down."""
        return (*([] if self.gate is None else [self.gate]), self.up, self.down)


def mlp_block(graph: Graph, site: Site) -> MLPBlock:
    """The fused form of an MLP; NotFusable where the kernels compute something else.

    The graph is of the base model, or specialised to a plan that keeps some of the MLP.
    """
    if any(each.kind == "layer" and each.module == site.module for each in graph.sites):
        raise NotFusable("its linears are the layer's own")
    linears = {o.module: o for o in graph if o.kind == "linear" and o.part == "decoder"}
    bound = [(binding.axis, linears.get(binding.module)) for binding in site.bindings]
    named = {linear.name for _, linear in bound if linear is not None}
    down = next((linear for axis, linear in bound if axis == "in"), None)
    if down is None or len(named) < len(bound):
        raise NotFusable("its weights are not read by one linear each")

    def source(operator: Operator) -> Operator:
        return graph.by_name[operator.inputs[0]]

    product = source(down)
    gated = product.kind == "multiply"
    parts = [graph.by_name[name] for name in product.inputs] if gated else [product]
    activations = [part for part in parts if part.kind == "activation"]
    plain = [part for part in parts if part.kind == "linear"]
    if len(activations) != 1 or len(plain) != len(parts) - 1:
        raise NotFusable("it is not an activation, or one times a projection")
    function = ACTIVATIONS.get(str(activations[0]["function"]))
    if function is None:
        raise NotFusable(f"its activation, {activations[0]['function']}, is none of the kernels'")
    inner = source(activations[0])
    up, gate = (plain[0], inner) if gated else (inner, None)
    if inner.kind != "linear" or up.inputs != inner.inputs:
        raise NotFusable("its activation does not read a projection of the block's input")
    if up is gate:
        raise NotFusable("its gate and its up projection are rows of one weight")
    if {inner.name, up.name, down.name} != named:
        raise NotFusable("its weights are not those of gate, up and down")
    return MLPBlock(up, down, gate, function)


def unit_width(binding: Binding, features: int) -> int | None:
    """Features to a unit of survivors, the same for every plan of a weight with so many features.

    It is what divides all lanes; None where that is less than a vector, as it is of single neurons:
    units are then as wide as a plan allows.
    """
    sizes = (size for block in binding.blocks for size in (block.offset, block.stride, block.width))
    width = math.gcd(features, *sizes)
    return width if width >= 8 else None

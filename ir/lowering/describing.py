"""Describing: an operator's kind, symbolic shape and attributes, from the nodes it is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from planner.ir.dims import Dim
from planner.ir.graph import Value
from planner.ir.lowering.aten import ACTIVATIONS, ATTENTION, HEAVY, NORMS, REDUCTIONS, VIEWS, opname
from planner.ir.lowering.flow import Flow
from planner.ir.lowering.rewrites import CAPPED

_KINDS = {
    **dict.fromkeys(ATTENTION, "attention"),
    **dict.fromkeys(NORMS, "norm"),
    **dict.fromkeys(ACTIVATIONS, "activation"),
    **dict.fromkeys(REDUCTIONS, "reduce"),
    **dict.fromkeys(("mul", "mul_"), "multiply"),
    **dict.fromkeys(("add", "add_", "sub"), "add"),
    **dict.fromkeys(
        ("cat", "stack", "index", "gather", "index_select", "roll", "pad", "repeat"), "gather"
    ),
    "softmax": "softmax",
    "embedding": "embedding",
}


def kind_of(node: fx.Node, flow: Flow) -> str:
    """Kind of the operator that a node is by itself."""
    name = opname(node)
    if name not in HEAVY or name in ATTENTION:
        return _KINDS.get(name, "elementwise")
    if name.startswith("grouped_mm"):
        return "experts"
    if name.startswith("conv"):
        return "conv"
    if name in ("linear", "addmm"):
        return "linear"
    weight = flow.weight(node)
    if weight is not None and weight.meta["val"].ndim == 3:
        return "experts"
    if weight is not None and weight is node.args[1] and name in ("mm", "matmul"):
        return "linear"
    return "matmul"


@dataclass(frozen=True)
class Markers:
    """Sizes that a module was captured with, whose multiples are therefore counts of tokens."""

    tokens: int = 0  # that it processes; 0 where every size is fixed
    encoded: int = 0  # that its attention reads beside them, an encoder's output; 0 without any

    def count(self, size: int) -> Dim | None:
        """A size of an activation as a count of tokens; None where it is none."""
        for marker, symbol in ((self.tokens, "query"), (self.encoded, "encoding")):
            if marker and size and size % marker == 0:
                return Dim.of(symbol) * (size // marker)
        both = self.encoded and size == self.tokens + self.encoded
        return Dim.of("query+encoding") if both else None

    def keys(self, size: int) -> Dim | int:
        """What a query of an attention meets."""
        known = {self.tokens: "context"} if self.tokens else {}
        if self.encoded:
            known |= {self.encoded: "encoded", self.tokens + self.encoded: "context+encoded"}
        return Dim.of(known[size]) if size in known else size


def symbolic_shape(
    sizes: Sequence[int], kind: str, samples: str, markers: Markers
) -> tuple[Dim, ...]:
    """The shape of an operator: samples first, then counts of tokens and of features."""
    marker = markers.tokens
    # A projection without a token count is of something else, image states say.
    projected = kind in ("linear", "attention", "norm")
    if marker and not projected and not any(markers.count(s) for s in sizes):
        # Work on chunks of tokens: shared out evenly.
        return (Dim.of(samples), Dim.of("query"), Dim(math.ceil(math.prod(sizes) / marker)))
    dims = tuple(markers.count(s) or Dim(s) for s in sizes)
    if dims and dims[0] == Dim(1):
        dims = dims[1:]
    return (Dim.of(samples), *dims)


# -- attributes -----------------------------------------------------------------------------------


class _Described:
    """One operator about to be described; `node` is the last of its nodes, with its output."""

    def __init__(self, nodes: Sequence[fx.Node], weight: fx.Node | None, markers: Markers) -> None:
        self.nodes, self.node, self.weight, self.markers = nodes, nodes[-1], weight, markers

    @property
    def input_shapes(self) -> list[tuple[int, ...]]:
        values = [argument.meta.get("val") for argument in self.node.all_input_nodes]
        return [tuple(map(int, value.shape)) for value in values if isinstance(value, Tensor)]

    def has(self, position: int) -> bool:
        """Whether the node is given an argument (a bias) at a position."""
        return len(self.node.args) > position and self.node.args[position] is not None


def _linear(it: _Described) -> dict[str, Value]:
    name = opname(it.node)
    # The operand itself, not the parameter behind it: fused weights are read in slices.
    operand: Any = it.node.args[2 if name == "addmm" else 1]
    rows, columns = (int(s) for s in operand.meta["val"].shape)
    if name != "linear":
        rows, columns = columns, rows
    return {"in": columns, "out": rows, "bias": int(name == "addmm" or it.has(2))}


def _conv(it: _Described) -> dict[str, Value]:
    assert it.weight is not None
    out, channels, *taps = (int(s) for s in it.weight.meta["val"].shape)
    return {"in": channels, "out": out, "kernel": math.prod(taps), "bias": int(it.has(2))}


def _attention(it: _Described) -> dict[str, Value]:
    query, key, value = (a.meta["val"] for a in it.node.args[:3])  # type: ignore[union-attr]
    keys = int(key.shape[-2])

    def heads(operand: Tensor) -> int:
        # Attention among the states of one token has the tokens where heads stand.
        count = int(operand.shape[1])
        return count // it.markers.tokens if it.markers.count(count) else count

    described: dict[str, Value] = {
        "heads": heads(query),
        "kv_heads": heads(key),
        "head_dim": int(query.shape[-1]),
        "value_dim": int(value.shape[-1]),
        "keys": it.markers.keys(keys),
    }
    return described | ({"capped": 1} if it.node.meta.get(CAPPED) else {})


def _experts(it: _Described) -> dict[str, Value]:
    shapes = it.input_shapes
    stacks = [s for s in shapes if len(s) == 3 and not any(map(it.markers.count, s))]
    out = int(it.node.meta["val"].shape[-1])
    return {"in": shapes[0][-1], "out": out, "experts": stacks[-1][0] if stacks else 1}


def _matmul(it: _Described) -> dict[str, Value]:
    return {"inner": it.input_shapes[0][-1]}


def _scan(it: _Described) -> dict[str, Value]:
    flops = sum(_product_flops(node) for node in it.nodes if opname(node) in HEAVY)
    return {"flops_per_row": math.ceil(flops / it.markers.tokens)}


def _embedding(it: _Described) -> dict[str, Value]:
    entries, width = it.input_shapes[0][:2]
    return {"entries": entries, "width": width}


def _norm(it: _Described) -> dict[str, Value]:
    shapes = it.input_shapes
    centred = opname(it.node) == "layer_norm"
    bias = centred and it.has(3)
    described: dict[str, Value] = {
        "width": shapes[0][-1] if shapes and shapes[0] else 1,
        "bias": int(bias),
    }
    # One with a bias is a LayerNorm in any case.
    return described | ({"centred": 1} if centred and not bias else {})


def _rotary(it: _Described) -> dict[str, Value]:
    turned = [n.meta["val"] for n in it.nodes if _KINDS.get(opname(n)) == "multiply"]
    lanes = max((int(value.shape[-1]) for value in turned if not value.is_complex()), default=0)
    return {"lanes": lanes} if 0 < lanes < int(it.node.meta["val"].shape[-1]) else {}


def _activation(it: _Described) -> dict[str, Value]:
    if any(node.kwargs.get("approximate") == "tanh" for node in it.nodes):
        return {"function": "gelu_tanh"}
    names = {opname(node) for node in it.nodes}
    # The same, written out.
    return {"function": "gelu_new"} if {"pow", "tanh"} <= names else _function(it)


def _function(it: _Described) -> dict[str, Value]:
    names = [opname(node) for node in it.nodes if opname(node) not in VIEWS]
    chosen = next((n for n in names if n in ACTIVATIONS), names[0] if names else "copy")
    return {"function": chosen}


_ATTRIBUTES: dict[str, Callable[[_Described], dict[str, Value]]] = {
    "linear": _linear,
    "conv": _conv,
    "attention": _attention,
    "experts": _experts,
    "matmul": _matmul,
    "scan": _scan,
    "embedding": _embedding,
    "norm": _norm,
    "rotary": _rotary,
    "activation": _activation,
    "reduce": _function,
    "elementwise": _function,
}


def attributes_of(
    kind: str, nodes: Sequence[fx.Node], weight: fx.Node | None, markers: Markers
) -> tuple[tuple[str, Value], ...]:
    """What the kind's cost formulas need, sorted by name, of an operator made of some nodes.

    `weight` is the parameter that it multiplies with.
    """
    if kind not in _ATTRIBUTES:
        return ()
    return tuple(sorted(_ATTRIBUTES[kind](_Described(nodes, weight, markers)).items()))


def _product_flops(node: fx.Node) -> int:
    """2 * multiply-adds of a product of activations."""
    output = node.meta["val"]
    inner = node.all_input_nodes[0].meta["val"].shape[-1]
    if opname(node).startswith("conv"):
        weight = node.all_input_nodes[1].meta["val"]
        inner = math.prod(weight.shape[1:])
    if opname(node) == "einsum":
        letters = str(node.args[0]).replace(" ", "").split("->")
        operands = letters[0].split(",")
        sizes: dict[str, int] = {}
        for term, argument in zip(operands, node.all_input_nodes, strict=False):
            sizes.update(zip(term, argument.meta["val"].shape, strict=False))
        inner = math.prod(sizes[x] for x in sizes if x not in letters[-1])
    return 2 * int(math.prod(output.shape)) * int(inner)

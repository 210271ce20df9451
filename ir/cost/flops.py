"""Exact FLOPs and parameters of an operator.

Convention: a multiply-add is two operations, attention is counted in full (not halved for
causality), and only products count - linear layers, attention, convolutions, grouped products. It is
what `torch.utils.flop_counter.FlopCounterMode` counts on the executed model with eager attention,
and agrees with it to the last operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from planner.ir.dims import Dim, product
from planner.ir.graph import KINDS, Operator

__all__ = ["operator_flops", "operator_kv_elements", "operator_parameters"]

Formula = Callable[[Operator, Mapping[str, int]], int]


def _zero(operator: Operator, sizes: Mapping[str, int]) -> int:
    return 0


def _linear(operator: Operator, sizes: Mapping[str, int]) -> int:
    """2 * rows * in * out."""
    rows = product(operator.shape[:-1], sizes)
    return 2 * rows * operator.integer("in") * operator.integer("out")


def _matmul(operator: Operator, sizes: Mapping[str, int]) -> int:
    return 2 * product(operator.shape, sizes) * operator.integer("inner")


def _conv(operator: Operator, sizes: Mapping[str, int]) -> int:
    taps = operator.integer("in") * operator.integer("kernel")
    return 2 * product(operator.shape, sizes) * taps


def _attention(operator: Operator, sizes: Mapping[str, int]) -> int:
    """q k^T and scores v: 2 * samples * heads * queries * keys * (head_dim + value_dim)."""
    value = operator.integer("value_dim")
    keys = Dim.of(operator["keys"]).evaluate(sizes)
    rows = product(operator.shape, sizes) // value
    return 2 * rows * keys * (operator.integer("head_dim") + value)


def _experts(operator: Operator, sizes: Mapping[str, int]) -> int:
    return 2 * product(operator.shape, sizes) * operator.integer("in")


def _scan(operator: Operator, sizes: Mapping[str, int]) -> int:
    rows = sizes["batch"] * sizes["query"]
    return rows * operator.integer("flops_per_row")


FORMULAS: Mapping[str, Formula] = {
    "linear": _linear,
    "fused_linear": _linear,
    "norm_linear": _linear,
    "matmul": _matmul,
    "conv": _conv,
    "attention": _attention,
    "experts": _experts,
    "scan": _scan,
}
assert set(FORMULAS) <= set(KINDS)


def operator_flops(operator: Operator, sizes: Mapping[str, int]) -> int:
    """FLOPs of one operator when the graph's symbols have the given sizes."""
    return FORMULAS.get(operator.kind, _zero)(operator, sizes)


def operator_parameters(operator: Operator) -> int:
    """Weights and biases that one operator reads."""
    kind = operator.kind
    if kind in ("linear", "fused_linear", "norm_linear"):
        out = operator.integer("out")
        return operator.integer("in") * out + (out if operator["bias"] else 0)
    if kind == "conv":
        out = operator.shape[1].constant
        taps = operator.integer("in") * operator.integer("kernel")
        return taps * out + (out if operator["bias"] else 0)
    if kind == "experts":
        return operator.integer("experts") * operator.integer("in") * operator.integer("out")
    if kind == "embedding":
        return operator.integer("entries") * operator.integer("width")
    if kind == "norm":
        return operator.integer("width")
    return 0


def operator_kv_elements(operator: Operator, sizes: Mapping[str, int]) -> int:
    """Keys and values that a decoder's attention leaves in the cache, in elements."""
    if operator.kind != "attention" or operator.part != "decoder":
        return 0
    keys = Dim.of(operator["keys"])
    if keys.is_constant:
        return 0
    per_token = operator.integer("head_dim") + operator.integer("value_dim")
    tokens = sizes["batch"] * keys.evaluate(sizes)
    return tokens * operator.integer("kv_heads") * per_token

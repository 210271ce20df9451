"""Exact FLOPs, parameters and cached keys and values of an operator.

Convention: a multiply-add is two operations, attention is counted in full (not halved for
causality), and only products count: linear layers, attention, convolutions, grouped products. It
is what `torch.utils.flop_counter.FlopCounterMode` counts on the executed model with eager
attention, and agrees with it to the last operation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

from planner.ir.dims import Dim, product
from planner.ir.graph import Operator

__all__ = [
    "FORMULAS",
    "attended_keys",
    "operator_flops",
    "operator_kv_elements",
    "operator_parameters",
    "operator_weights",
    "tokens_scored",
]

Formula = Callable[[Operator, Mapping[str, int]], int]


def attended_keys(operator: Operator, sizes: Mapping[str, int]) -> int:
    """Keys that each query of an attention meets.

    A cache with a sliding window hands over at most the window's last tokens besides the tokens
    being processed, and drops the others; a prompt that begins with an empty cache is computed
    in full, whatever the window.
    """
    keys = Dim.of(operator["keys"]).evaluate(sizes)
    if operator.get("window") is None:
        return keys
    queries = operator.shape[-2].evaluate(sizes)
    return queries + min(keys - queries, operator.integer("window") - 1)


def tokens_scored(operator: Operator, sizes: Mapping[str, int]) -> int:
    """Tokens that a token stage chooses from, in all samples; 0 where it keeps everything.

    A decoding step passes its one token on.
    """
    before = Dim.of(operator["before"]).evaluate(sizes)
    return 0 if before == operator.shape[-2].evaluate(sizes) else sizes["batch"] * before


def _linear(operator: Operator, sizes: Mapping[str, int]) -> int:
    """2 * rows * in * out."""
    rows = product(operator.shape[:-1], sizes)
    return 2 * rows * operator.integer("in") * operator.integer("out")


def _matmul(operator: Operator, sizes: Mapping[str, int]) -> int:
    """2 * rows * inner * columns."""
    return 2 * product(operator.shape, sizes) * operator.integer("inner")


def _conv(operator: Operator, sizes: Mapping[str, int]) -> int:
    """2 * output elements * input channels of a group * kernel taps."""
    taps = operator.integer("in") * operator.integer("kernel")
    return 2 * product(operator.shape, sizes) * taps


def _attention(operator: Operator, sizes: Mapping[str, int]) -> int:
    """q k^T and scores v: 2 * samples * heads * queries * keys * (head_dim + value_dim)."""
    value = operator.integer("value_dim")
    rows = product(operator.shape[:-1], sizes)
    return 2 * rows * attended_keys(operator, sizes) * (operator.integer("head_dim") + value)


def _experts(operator: Operator, sizes: Mapping[str, int]) -> int:
    """2 * routed rows * in * out."""
    return 2 * product(operator.shape, sizes) * operator.integer("in")


def _scan(operator: Operator, sizes: Mapping[str, int]) -> int:
    """Products inside the recurrence, shared out evenly over the tokens."""
    symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
    # After a token stage at layer k the tokens are counted by query.k.
    (query,) = (symbol for symbol in symbols if symbol.startswith("query"))
    return sizes["batch"] * sizes[query] * operator.integer("flops_per_row")


def _select_tokens(operator: Operator, sizes: Mapping[str, int]) -> int:
    """2 * samples * tokens * score_width: one query's scores, where any token is dropped at all."""
    return 2 * tokens_scored(operator, sizes) * operator.integer("score_width")


# Every kind that multiplies; the others have no FLOPs in this convention.
FORMULAS: Mapping[str, Formula] = MappingProxyType(
    {
        "linear": _linear,
        "fused_linear": _linear,
        "norm_linear": _linear,
        "matmul": _matmul,
        "conv": _conv,
        "attention": _attention,
        "experts": _experts,
        "scan": _scan,
        "select_tokens": _select_tokens,
    }
)


def operator_flops(operator: Operator, sizes: Mapping[str, int]) -> int:
    """FLOPs of one operator when the graph's symbols have the given sizes."""
    formula = FORMULAS.get(operator.kind)
    return formula(operator, sizes) if formula else 0


def operator_weights(operator: Operator) -> int:
    """Elements of the weights and biases that an operator owns or shares."""
    kind = operator.kind
    if kind in ("linear", "fused_linear"):
        return (operator.integer("in") + operator.integer("bias")) * operator.integer("out")
    if kind == "norm_linear":
        columns, norm_bias = operator.integer("in"), operator.integer("norm_bias")
        linear = (columns + operator.integer("bias")) * operator.integer("out")
        return linear + columns * (1 + norm_bias)
    if kind == "conv":
        taps = operator.integer("in") * operator.integer("kernel")
        return (taps + operator.integer("bias")) * operator.integer("out")
    if kind == "experts":
        return operator.integer("experts") * operator.integer("in") * operator.integer("out")
    if kind == "embedding":
        return operator.integer("entries") * operator.integer("width")
    if kind == "norm":
        return operator.integer("width") * (1 + operator.integer("bias"))
    return 0


def operator_parameters(operator: Operator) -> int:
    """Parameters that an operator adds to the model: 0 where it shares another's (a tied lm_head).

    Parameters that are just added to activations (positions, class tokens) are not counted.
    """
    return 0 if operator.get("tied") else operator_weights(operator)


def operator_kv_elements(operator: Operator, sizes: Mapping[str, int]) -> int:
    """Elements of the keys and values that a decoder's attention leaves in the cache."""
    if operator.kind != "attention" or operator.part != "decoder":
        return 0
    keys = Dim.of(operator["keys"])
    if keys.is_constant:
        return 0
    tokens = keys.evaluate(sizes)
    if operator.get("window") is not None:
        tokens = min(tokens, operator.integer("window") - 1)
    per_token = operator.integer("head_dim") + operator.integer("value_dim")
    return sizes["batch"] * tokens * operator.integer("kv_heads") * per_token

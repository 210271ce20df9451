"""Kinds that multiply: linears, attention, convolutions, and the like."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar

from typing_extensions import override

from planner.ir.dims import Dim
from planner.ir.graph import Operator
from planner.ir.kinds.record import Attribute, Kind, last_is, sampled_elements

__all__ = ["Linear", "Product", "attended_keys"]


class Product(Kind):
    """What FlopCounterMode counts."""


class Linear(Product, name="linear"):
    """``x W^T (+ b)``; `tied` where the weights are another operator's as well."""

    attributes: ClassVar[tuple[Attribute, ...]] = (
        Attribute("bias", least=0),
        Attribute("in"),
        Attribute("out"),
        Attribute("tied", optional=True),
    )

    @override
    def shape_fault(self, operator: Operator) -> str | None:
        return last_is(operator, "out")

    @override
    def input_fault(self, operator: Operator, inputs: Sequence[Operator]) -> str | None:
        """It takes the features of its input: all, a part, or the same ones several times."""
        if len(inputs) != 1:
            return None
        columns = operator.integer("in")
        taken = sampled_elements(operator) // operator.integer("out") * columns
        have = sampled_elements(inputs[0])
        if taken > have and taken % have:
            return f"takes {columns} features, {inputs[0].name} has fewer"
        return None

    @override
    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        return 2 * operator.rows(sizes) * operator.integer("in") * operator.integer("out")

    @override
    def weights(self, operator: Operator) -> int:
        return (operator.integer("in") + operator.integer("bias")) * operator.integer("out")

    @override
    def inputs_read(
        self, operator: Operator, inputs: Iterable[int], sizes: Mapping[str, int]
    ) -> int:
        return operator.rows(sizes) * operator.integer("in")

    @override
    def keeps_zero(self, operator: Operator) -> bool:
        return not operator["bias"]


class FusedLinear(Linear, name="fused_linear"):
    """`count` linears with one input, run as one; written by passes."""

    attributes: ClassVar[tuple[Attribute, ...]] = (*Linear.attributes, Attribute("count"))


class NormLinear(FusedLinear, name="norm_linear"):
    """A norm folded into the (fused) linear after it; written by passes."""

    attributes = (*FusedLinear.attributes, Attribute("norm_bias", least=0))

    @override
    def weights(self, operator: Operator) -> int:
        norm = operator.integer("in") * (1 + operator.integer("norm_bias"))
        return super().weights(operator) + norm

    @override
    def keeps_zero(self, operator: Operator) -> bool:
        return super().keeps_zero(operator) and not operator["norm_bias"]


class Experts(Product, name="experts"):
    """A grouped product: each row is routed to one of `experts` linears."""

    attributes = (Attribute("experts"), Attribute("in"), Attribute("out"))

    @override
    def shape_fault(self, operator: Operator) -> str | None:
        return last_is(operator, "out")

    @override
    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        return 2 * operator.elements(sizes) * operator.integer("in")

    @override
    def weights(self, operator: Operator) -> int:
        return operator.integer("experts") * operator.integer("in") * operator.integer("out")

    @override
    def weights_read(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        """Few rows leave most experts untouched."""
        used = min(operator.integer("experts"), operator.rows(sizes))
        return used * operator.integer("in") * operator.integer("out")

    @override
    def inputs_read(
        self, operator: Operator, inputs: Iterable[int], sizes: Mapping[str, int]
    ) -> int:
        return operator.rows(sizes) * operator.integer("in")


class Conv(Product, name="conv"):
    """A convolution; `in` counts the channels of one group, `kernel` its taps."""

    attributes = (
        Attribute("bias", least=0),
        Attribute("in"),
        Attribute("kernel"),
        Attribute("out"),
    )

    @override
    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        taps = operator.integer("in") * operator.integer("kernel")
        return 2 * operator.elements(sizes) * taps

    @override
    def weights(self, operator: Operator) -> int:
        taps = operator.integer("in") * operator.integer("kernel")
        return (taps + operator.integer("bias")) * operator.integer("out")


class Matmul(Product, name="matmul"):
    """A batched product of two activations; `inner` is the size that it sums over."""

    attributes = (Attribute("inner"),)

    @override
    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        return 2 * operator.elements(sizes) * operator.integer("inner")


class Scan(Product, name="scan"):
    """A state-space or linear-attention recurrence; its products are shared out over the tokens."""

    attributes = (Attribute("flops_per_row"),)

    @override
    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
        # After a token stage at layer k the tokens are counted by query.k.
        (query,) = (symbol for symbol in symbols if symbol.startswith("query"))
        return sizes["batch"] * sizes[query] * operator.integer("flops_per_row")


class Attention(Product, name="attention"):
    """``softmax(q k^T) v``, never halved for causality.

    `window` is there where the cache keeps only the latest tokens, `capped` where scores are
    bounded by tanh.
    """

    attributes = (
        Attribute("capped", optional=True),
        Attribute("head_dim"),
        Attribute("heads"),
        Attribute("keys", "tokens"),
        Attribute("kv_heads"),
        Attribute("value_dim"),
        Attribute("window", optional=True),
    )

    @override
    def shape_fault(self, operator: Operator) -> str | None:
        heads, groups = operator.integer("heads"), operator.integer("kv_heads")
        if heads % groups:
            return f"heads in {groups} equal groups, not {heads} of them"
        places = operator.shape[-3:-2]
        if not places or (places[0].is_constant and places[0] != Dim(heads)):
            return f"{heads} heads before its tokens"
        return last_is(operator, "value_dim")

    @override
    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        """Scores, and their product with the values."""
        features = operator.integer("head_dim") + operator.integer("value_dim")
        return 2 * operator.rows(sizes) * attended_keys(operator, sizes) * features

    @override
    def inputs_read(
        self, operator: Operator, inputs: Iterable[int], sizes: Mapping[str, int]
    ) -> int:
        """Queries, and the keys and values once per KV head, however many queries share them."""
        *samples, heads, queries, value_dim = (dim.evaluate(sizes) for dim in operator.shape)
        head_dim = operator.integer("head_dim")
        keys = attended_keys(operator, sizes) * operator.integer("kv_heads")
        return math.prod(samples) * (heads * queries * head_dim + keys * (head_dim + value_dim))

    @override
    def cached(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        """Keys and values of a decoder, unless there is always the same number of them."""
        keys = Dim.of(operator["keys"])
        if operator.part != "decoder" or keys.is_constant:
            return 0
        tokens = keys.evaluate(sizes)
        if operator.get("window") is not None:
            tokens = min(tokens, operator.integer("window") - 1)
        per_token = operator.integer("head_dim") + operator.integer("value_dim")
        return sizes["batch"] * tokens * operator.integer("kv_heads") * per_token


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

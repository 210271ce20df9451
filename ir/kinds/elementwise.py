"""Kinds that work element by element, or row by row, without a product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from typing_extensions import override

from planner.ir.dims import Dim
from planner.ir.graph import Operator
from planner.ir.kinds.record import Attribute, Kind, sampled_elements

__all__ = ["SINGLE_PRECISION"]

# Stock code computes norms, rotations and some activations (tanh-approximated GELU) in several
# steps, holding up to three values of the output's size on the way.
_STEPS = 3
# Bytes of an element in single precision, in which norms, softmax and rotations are computed.
SINGLE_PRECISION = 4
# Activations that are computed in one step.
_ONE_STEP = frozenset(
    ["silu", "gelu", "gelu_tanh", "relu", "leaky_relu", "elu", "mish", "hardswish"]
)


class Light(Kind):
    """Elementwise work: of a wider input (a fused projection's gate) only a slice is read."""

    light_operations = 1

    @override
    def inputs_read(
        self, operator: Operator, inputs: Iterable[int], sizes: Mapping[str, int]
    ) -> int:
        output = operator.elements(sizes)
        return sum(min(elements, output) for elements in inputs)


class Norm(Light, name="norm"):
    """RMSNorm, LayerNorm or GroupNorm; `centred` for a LayerNorm without a bias."""

    attributes = (
        Attribute("bias", least=0),
        Attribute("centred", optional=True),
        Attribute("width"),
    )
    light_operations = 7

    @override
    def weights(self, operator: Operator) -> int:
        return operator.integer("width") * (1 + operator.integer("bias"))

    @override
    def intermediate_bytes(self, operator: Operator, element: int) -> int:
        return _STEPS * SINGLE_PRECISION

    @override
    def keeps_zero(self, operator: Operator) -> bool:
        return not operator["bias"]


class Softmax(Light, name="softmax"):
    """A softmax outside an attention."""

    light_operations = 5

    @override
    def intermediate_bytes(self, operator: Operator, element: int) -> int:
        return _STEPS * SINGLE_PRECISION


class Rotary(Light, name="rotary"):
    """Rotation of queries or keys by position; of each head's features only `lanes`, if given."""

    attributes = (Attribute("lanes", optional=True),)
    light_operations = 3

    @override
    def intermediate_bytes(self, operator: Operator, element: int) -> int:
        return _STEPS * element


class Activation(Light, name="activation"):
    """An elementwise non-linearity."""

    attributes = (Attribute("function", "word"),)
    light_operations = 4

    @override
    def intermediate_bytes(self, operator: Operator, element: int) -> int:
        return 0 if operator["function"] in _ONE_STEP else _STEPS * element


class Elementwise(Light, name="elementwise"):
    """Any other elementwise work."""

    attributes = (Attribute("function", "word"),)


class Add(Light, name="add"):
    """A sum, residual connections among them."""

    @override
    def input_fault(self, operator: Operator, inputs: Sequence[Operator]) -> str | None:
        return _not_broadcast(operator, inputs)


class Multiply(Light, name="multiply"):
    """An elementwise product, or a scaling by a constant."""

    @override
    def input_fault(self, operator: Operator, inputs: Sequence[Operator]) -> str | None:
        return _not_broadcast(operator, inputs)

    @override
    def keeps_zero(self, operator: Operator) -> bool:
        return True


def _not_broadcast(operator: Operator, inputs: Sequence[Operator]) -> str | None:
    """A smaller operand of equal rank in a sum or product broadcasts.

    Views are no operators, so an operand of the same size or larger may be arranged otherwise or
    read in part, and a smaller one may be arranged otherwise before it is broadcast.
    """
    for source in inputs:
        if len(source.shape) != len(operator.shape):
            continue
        *others, last = (
            have in (want, Dim(1)) for have, want in zip(source.shape, operator.shape, strict=True)
        )
        have, want = sampled_elements(source), sampled_elements(operator)
        features_differ = all(others) and not last
        if have < want and (features_differ or (not all(others) and want % have)):
            return f"cannot broadcast {source.name} to its shape"
    return None


class Reduce(Kind, name="reduce"):
    """Sum, mean, maximum, top-k and the like."""

    attributes = (Attribute("function", "word"),)
    light_operations = 1

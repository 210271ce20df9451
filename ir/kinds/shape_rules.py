"""Shape rules: what a shape should have by an operator's attributes, and by its inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from planner.ir.dims import Dim
from planner.ir.graph import Operator

# Size at which shapes are compared: a prime, so that different expressions differ.
_SAMPLE = 1009


def _elements(operator: Operator) -> int:
    symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
    return operator.elements(dict.fromkeys(symbols, _SAMPLE))


def last_is(attribute: str) -> Callable[[Operator], str | None]:
    """The last dimension is what an attribute says."""

    def fault(o: Operator) -> str | None:
        fits = o.shape[-1] == Dim(o.integer(attribute))
        return None if fits else f"{o[attribute]} features ({attribute})"

    return fault


def lacks_features(operator: Operator, inputs: Sequence[Operator]) -> str | None:
    """A linear takes the features of its input: all, a part, or the same ones several times."""
    if len(inputs) != 1:
        return None
    columns, have = operator.integer("in"), _elements(inputs[0])
    taken = _elements(operator) // operator.integer("out") * columns
    if taken > have and taken % have:
        return f"takes {columns} features, {inputs[0].name} has fewer"
    return None


def cannot_broadcast(operator: Operator, inputs: Sequence[Operator]) -> str | None:
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
        have, want = _elements(source), _elements(operator)
        features_differ = all(others) and not last
        if have < want and (features_differ or (not all(others) and want % have)):
            return f"cannot broadcast {source.name} to its shape"
    return None

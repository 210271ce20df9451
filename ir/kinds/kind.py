"""What planner knows of a kind of operator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from planner.ir.dims import Dim, Sizes
from planner.ir.graph import Operator, Value


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute that operators of a kind have."""

    name: str  # as the text form writes it
    # ``count``, ``tokens`` (a count that may be symbolic) or ``word``.
    type: Literal["count", "tokens", "word"] = "count"
    least: int = 1  # the smallest count allowed
    optional: bool = False  # absent where it does not apply

    def read(self, text: str) -> Value:
        """The value that a text stands for; ValueError where it is none."""
        if self.type == "word":
            return text
        return int(text) if text.isascii() and text.isdecimal() else Dim.parse(text)

    def fault(self, operator: Operator) -> str | None:
        """What is wrong with an operator's value, in one sentence."""
        value = operator.get(self.name)
        if value is None:
            lack = f"operator {operator.name} ({operator.kind}) lacks the attribute {self.name}"
            return None if self.optional else lack
        what = f"attribute {self.name} of operator {operator.name} is {value}"
        if self.type == "word":
            return None if isinstance(value, str) else f"{what}, not a word"
        if isinstance(value, int):
            return what if value < self.least else None
        symbolic = self.type == "tokens" and isinstance(value, Dim)
        return None if symbolic else f"{what}, not a count"


@dataclass(frozen=True)
class Kind:
    """What planner knows of one kind of operator."""

    name: str  # as the text form writes it
    computes: str  # in words
    attributes: tuple[Attribute, ...] = ()  # what operators of the kind have
    # What the shape should have by the attributes, where it has not.
    shape_fault: Callable[[Operator], str | None] = lambda o: None
    # What the operator cannot do with the shapes of its inputs.
    input_fault: Callable[[Operator, Sequence[Operator]], str | None] = lambda o, inputs: None
    runs: Callable[[Operator, Sizes], bool] = lambda o, n: True  # whether there is anything to do
    # Two for each multiply-add; None for kinds without a product.
    flops: Callable[[Operator, Sizes], int] | None = None
    light_operations: int = 0  # without a product, for each element of the output, that take time
    # Elements of the weights and biases that the operator owns or shares.
    weights: Callable[[Operator], int] = lambda o: 0
    weights_read: Callable[[Operator, Sizes], int] | None = None  # elements of them; None: all
    # Elements of activations that it reads, by those of each input.
    inputs_read: Callable[[Operator, Sizes, Iterable[int]], int] = lambda o, n, inputs: sum(inputs)
    cached: Callable[[Operator, Sizes], int] = lambda o, n: 0  # elements left in the KV cache
    # Held while it runs for each element of its output, by the bytes of an element.
    held_bytes: Callable[[Operator, int], int] = lambda o, element: 0
    # Whether its output is zero where all of its inputs are.
    keeps_zero: Callable[[Operator], bool] = lambda o: False

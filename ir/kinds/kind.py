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
    """What planner knows of one kind of operator.

    Attributes:
        name: as the text form writes it.
        computes: in words.
        attributes: what operators of the kind have.
        shape_fault: (o) what the shape should have by the attributes, where it has not.
        input_fault: (o, inputs) what the operator cannot do with the shapes of its inputs.
        runs: (o, n) whether there is anything to do.
        flops: (o, n) two for each multiply-add; None for kinds without a product.
        light_operations: without a product, work for each element of the output that takes time
            on the roofline.
        weights: (o) elements of the weights and biases that the operator owns or shares.
        weights_read: (o, n) elements of them that it reads; None: all.
        inputs_read: (o, n, inputs) elements of activations that it reads, by those of each input.
        cached: (o, n) elements that it leaves in the KV cache.
        held_bytes: (o, bytes of an element) held while it runs, for each element of its output.
        keeps_zero: (o) whether its output is zero where all of its inputs are.
    """

    name: str
    computes: str
    attributes: tuple[Attribute, ...] = ()
    shape_fault: Callable[[Operator], str | None] = lambda o: None
    input_fault: Callable[[Operator, Sequence[Operator]], str | None] = lambda o, inputs: None
    runs: Callable[[Operator, Sizes], bool] = lambda o, n: True
    flops: Callable[[Operator, Sizes], int] | None = None
    light_operations: int = 0
    weights: Callable[[Operator], int] = lambda o: 0
    weights_read: Callable[[Operator, Sizes], int] | None = None
    inputs_read: Callable[[Operator, Sizes, Iterable[int]], int] = lambda o, n, inputs: sum(inputs)
    cached: Callable[[Operator, Sizes], int] = lambda o, n: 0
    held_bytes: Callable[[Operator, int], int] = lambda o, element: 0
    keeps_zero: Callable[[Operator], bool] = lambda o: False

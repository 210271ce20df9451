"""What planner knows of a kind of operator: the type of the records, and the register of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from planner.ir.dims import Dim
from planner.ir.graph import Operator, Value

__all__ = ["KINDS", "Attribute", "Kind", "kind_of", "last_is", "sampled_elements"]

# Size at which shapes are compared: a prime, so that different expressions differ.
_SAMPLE = 1009

# Name -> record.
KINDS: dict[str, Kind] = {}


def kind_of(operator: Operator) -> Kind:
    """The record of an operator's kind, which must be a known one."""
    return KINDS[operator.kind]


@dataclass(frozen=True, slots=True)
class Attribute:
    """An attribute that operators of a kind have.

    Attributes:
        name: as the text form writes it.
        type: ``count``, ``tokens`` (a count that may be symbolic) or ``word``.
        least: the smallest count allowed.
        optional: absent where it does not apply.
    """

    name: str
    type: Literal["count", "tokens", "word"] = "count"
    least: int = 1
    optional: bool = False

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


class Kind:
    """A kind of operator: its attributes, its shape, and what it costs.

    A record is a subclass that gives its kind's name, ``class Add(Kind, name="add")``, and says
    in its docstring what the operator computes. Whatever it does not override is as here: no
    attributes, any shape, no FLOPs, no weights; all inputs are read.

    Throughout, `sizes` gives the size of every symbol, and elements are those of all samples.

    Attributes:
        name: as the text form writes it.
        attributes: what operators of the kind have.
        light_operations: work for each element of the output that is no FLOPs in planner's sense
            but takes time on the roofline, where no matrices are multiplied.
    """

    name: ClassVar[str]
    attributes: ClassVar[tuple[Attribute, ...]] = ()
    light_operations: ClassVar[int] = 0

    def __init_subclass__(cls, name: str = "") -> None:
        """Register a record; a subclass without a name is what several records have in common."""
        super().__init_subclass__()
        if name in KINDS:
            raise ValueError(f"there are two records of the kind '{name}'")
        if name:
            cls.name = name
            KINDS[name] = cls()

    # -- the shape ---------------------------------------------------------------------------

    def shape_fault(self, operator: Operator) -> str | None:
        """What the operator's shape should have by its attributes, where it has not."""
        return None

    def input_fault(self, operator: Operator, inputs: Sequence[Operator]) -> str | None:
        """What the operator cannot do with the shapes of its inputs, as a predicate."""
        return None

    # -- the cost ----------------------------------------------------------------------------

    def runs(self, operator: Operator, sizes: Mapping[str, int]) -> bool:
        """Whether there is anything to do."""
        return True

    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        """Two for each multiply-add of a product; all else is free (see `planner.ir.cost`)."""
        return 0

    def weights(self, operator: Operator) -> int:
        """Elements of the weights and biases that the operator owns or shares."""
        return 0

    def weights_read(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        """Elements of the weights that it reads."""
        return self.weights(operator)

    def inputs_read(
        self, operator: Operator, inputs: Iterable[int], sizes: Mapping[str, int]
    ) -> int:
        """Elements of the activations that it reads; `inputs` gives the size of each input."""
        return sum(inputs)

    def cached(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        """Elements that it leaves in the KV cache."""
        return 0

    def intermediate_bytes(self, operator: Operator, element: int) -> int:
        """Bytes that it holds while it runs, for each element of its output.

        Args:
            operator: of the kind.
            element: bytes of an element.
        """
        return 0

    # -- what passes ask ---------------------------------------------------------------------

    def keeps_zero(self, operator: Operator) -> bool:
        """Whether its output is zero where all of its inputs are."""
        return False


def last_is(operator: Operator, attribute: str) -> str | None:
    """A `Kind.shape_fault`: the last dimension should be what an attribute says."""
    if operator.shape[-1] == Dim(operator.integer(attribute)):
        return None
    return f"{operator[attribute]} features ({attribute})"


def sampled_elements(operator: Operator) -> int:
    """Elements of an operator's output where all its symbols have one size, to compare shapes."""
    symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
    return operator.elements(dict.fromkeys(symbols, _SAMPLE))

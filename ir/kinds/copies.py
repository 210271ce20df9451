"""Kinds that bring values in or copy them: inputs, look-ups, gathers, the choice of tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from typing_extensions import override

from planner.ir.dims import Dim
from planner.ir.graph import Operator
from planner.ir.kinds.record import Attribute, Kind, last_is

__all__: list[str] = []


class Input(Kind, name="input"):
    """Tokens or pixels that enter a part."""

    @override
    def runs(self, operator: Operator, sizes: Mapping[str, int]) -> bool:
        return False


class Copy(Kind):
    """As many elements are read as are written."""

    @override
    def inputs_read(
        self, operator: Operator, inputs: Iterable[int], sizes: Mapping[str, int]
    ) -> int:
        return operator.elements(sizes)


class Embedding(Copy, name="embedding"):
    """Table look-up; the rows read count as its input."""

    attributes = (Attribute("entries"), Attribute("width"))

    @override
    def shape_fault(self, operator: Operator) -> str | None:
        return last_is(operator, "width")

    @override
    def weights(self, operator: Operator) -> int:
        return operator.integer("entries") * operator.integer("width")

    @override
    def weights_read(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        return 0


class Gather(Copy, name="gather"):
    """Tokens or rows copied by index."""

    @override
    def keeps_zero(self, operator: Operator) -> bool:
        return True


class SelectTokens(Copy, name="select_tokens"):
    """Keeps the image tokens that a selector chose; written by passes.

    It keeps `keep` image tokens of `of`; `before` counts all tokens until then, and `score_width`
    the query features that score them (0: none).
    """

    attributes = (
        Attribute("before", "tokens"),
        Attribute("keep", least=0),
        Attribute("of"),
        Attribute("score_width", least=0),
    )

    @override
    def shape_fault(self, operator: Operator) -> str | None:
        keep, of = operator.integer("keep"), operator.integer("of")
        return f"at most {of} tokens, not {keep}" if keep > of else None

    @override
    def runs(self, operator: Operator, sizes: Mapping[str, int]) -> bool:
        return self._scored(operator, sizes) > 0

    @override
    def flops(self, operator: Operator, sizes: Mapping[str, int]) -> int:
        """The scores of one query, where any token is dropped at all."""
        return 2 * self._scored(operator, sizes) * operator.integer("score_width")

    @override
    def inputs_read(
        self, operator: Operator, inputs: Iterable[int], sizes: Mapping[str, int]
    ) -> int:
        keys = self._scored(operator, sizes) * operator.integer("score_width")
        return super().inputs_read(operator, inputs, sizes) + keys

    @staticmethod
    def _scored(operator: Operator, sizes: Mapping[str, int]) -> int:
        """Tokens chosen from, in all samples; 0 where all are kept, as in a decoding step."""
        before = Dim.of(operator["before"]).evaluate(sizes)
        return 0 if before == operator.shape[-2].evaluate(sizes) else sizes["batch"] * before

"""Symbolic sizes: linear expressions over named token counts, such as ``2*query+1``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

# Symbol -> size.
Sizes = Mapping[str, int]

_TERM = re.compile(
    r"(?:(?P<coefficient>\d+)(?:\*(?P<symbol>[a-z][a-z0-9_.]*))?|(?P<alone>[a-z][a-z0-9_.]*))"
)


@dataclass(frozen=True, slots=True)
class Dim:
    """``constant + sum(coefficient * symbol)`` with non-negative integer coefficients.

    The symbols used by the lowering are ``batch`` (samples), ``images`` (runs of the vision
    encoder), ``query`` (decoder tokens being processed), ``context`` (decoder tokens attended to),
    ``encoding`` and ``encoded`` (the same of an encoder's output that a decoder attends to beside
    its tokens) and, after a token stage at layer k, ``query.k`` and ``context.k``.
    """

    constant: int = 0
    terms: tuple[tuple[str, int], ...] = ()

    @staticmethod
    def of(value: int | str | Dim) -> Dim:
        """Build a Dim from an integer, a symbol or expression, or another Dim."""
        if isinstance(value, Dim):
            return value
        if isinstance(value, int):
            return Dim(value)
        return Dim.parse(value)

    @staticmethod
    def parse(text: str) -> Dim:
        """Read the text form, for example ``2*query+1``; raise ValueError on anything else."""
        constant = 0
        terms: dict[str, int] = {}
        for part in text.split("+"):
            match = _TERM.fullmatch(part)
            if match is None:
                raise ValueError(f"'{text}' is not a size such as 128, query or 2*query+1")
            if match["alone"]:
                terms[match["alone"]] = terms.get(match["alone"], 0) + 1
            elif match["symbol"]:
                symbol = match["symbol"]
                terms[symbol] = terms.get(symbol, 0) + int(match["coefficient"])
            else:
                constant += int(match["coefficient"])
        return Dim(constant, tuple(sorted((s, c) for s, c in terms.items() if c)))

    def __str__(self) -> str:
        parts = [symbol if c == 1 else f"{c}*{symbol}" for symbol, c in self.terms]
        if self.constant or not parts:
            parts.append(str(self.constant))
        return "+".join(parts)

    def __mul__(self, factor: int) -> Dim:
        return Dim(self.constant * factor, tuple((s, c * factor) for s, c in self.terms if factor))

    def evaluate(self, sizes: Sizes) -> int:
        """The number this stands for when its symbols have the given sizes."""
        total = self.constant
        for symbol, coefficient in self.terms:
            total += coefficient * sizes[symbol]
        return total

    def rename(self, names: Mapping[str, str]) -> Dim:
        """The same expression with symbols renamed."""
        if not any(symbol in names for symbol, _ in self.terms):
            return self
        return Dim(self.constant, tuple(sorted((names.get(s, s), c) for s, c in self.terms)))

    @property
    def symbols(self) -> frozenset[str]:
        """The names this expression depends on."""
        return frozenset(symbol for symbol, _ in self.terms)

    @property
    def is_constant(self) -> bool:
        """Whether this is a plain number."""
        return not self.terms


def product(shape: tuple[Dim, ...], sizes: Sizes) -> int:
    """Number of elements of a shape at the given sizes."""
    total = 1
    for dim in shape:
        total *= dim.evaluate(sizes)
    return total

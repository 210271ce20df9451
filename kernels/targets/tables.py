"""Index tensors whose contents are known: what is looked up at an index, as arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Table:
    """Known contents of an index tensor: what the device function of some name and meaning gives.

    Pieces are (start, base, slope): ``base + slope * i`` from index `start` on, ascending from 0.
    """

    function: str
    meaning: str
    pieces: tuple[tuple[int, int, int], ...]

    @staticmethod
    def of(function: str, meaning: str, entries: Sequence[int]) -> Table:
        """The table with these entries: runs of consecutive or of equal numbers are a piece."""
        pieces: list[tuple[int, int, int]] = []
        for index, entry in enumerate(entries):
            if pieces:
                start, base, slope = pieces[-1]
                if index == start + 1 and entry in (base + start * slope, base + index):
                    pieces[-1] = (start, entry - index, 1) if entry == base + index else pieces[-1]
                if entry == pieces[-1][1] + pieces[-1][2] * index:
                    continue
            run = index + 1 < len(entries) and entries[index + 1] == entry
            pieces.append((index, entry, 0) if run else (index, entry - index, 1))
        if len(entries) < 2:
            pieces = [(0, entry, 0) for entry in entries] or [(0, 0, 0)]
        return Table(function, meaning, tuple(pieces))

    @property
    def constant(self) -> int | None:
        """The value of every entry, where they are equal."""
        (_, base, slope), *more = self.pieces
        return base if slope == 0 and not more else None

    @property
    def is_identity(self) -> bool:
        """Whether entry i is i."""
        return self.pieces == ((0, 0, 1),)

    @property
    def source(self) -> str:
        """The device function ``function(index)``."""

        def value(base: int, slope: int) -> str:
            return str(base) if not slope else f"index + {base}" if base else "index"

        _, base, slope = self.pieces[0]
        lines = [f"    entry = {value(base, slope)}"]
        for start, base, slope in self.pieces[1:]:
            lines.append(f"    entry = tl.where(index >= {start}, {value(base, slope)}, entry)")
        body = "\n".join([*lines, "    return entry"])
        return f'@triton.jit\ndef {self.function}(index):\n    """{self.meaning}"""\n{body}\n'

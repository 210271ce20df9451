"""Cells that a page of results has: measured on another machine, they are not measured again.

With every row a page's JSON has the digest of what it is of, one digit for each question, and a
static plan's decision. So a page grows part by part, wherever it is worked on, and anyone can hold
results of their own against it, question by question.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from planner.documents import read_json
from planner.ir.errors import InputError

Row = dict[str, Any]


def digest(identity: Any) -> str:
    """What a cell is of, in 16 letters."""
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def packed(digits: str) -> str:
    """A string of 0 and 1, written shorter."""
    return f"{len(digits)}:{int(digits or '0', 2):x}"


def unpacked(text: str) -> str:
    """What `packed` was given."""
    count, _, number = text.partition(":")
    digits = f"{int(number, 16):b}".zfill(int(count))
    return digits if int(count) else ""


def as_published(row: Mapping[str, Any], cell: str) -> Row:
    """A measured row as a page's JSON has it; `cell`: the digest of what it is of."""
    written: Row = {**row, "cell": cell}
    if "right" in row:
        written["right"] = packed(row["right"])
    if "plan" in row:
        count, *switches = row["plan"]
        written["plan"] = f"{count} {packed(''.join(map(str, switches)))}"
    return written


def as_measured(row: Mapping[str, Any]) -> Row:
    """What `as_published` was given."""
    known: Row = {name: value for name, value in row.items() if name != "cell"}
    if "right" in row:
        known["right"] = unpacked(row["right"])
    if "plan" in row:
        count, _, switches = row["plan"].partition(" ")
        known["plan"] = [int(count), *map(int, unpacked(switches))]
    return known


@dataclass(frozen=True)
class Published:
    """What a page has.

    Attributes:
        rows: by seed and the digest of what a cell is of; those of older pages have no digits.
        differences: between variants; of rows without digits they cannot be computed again.
        learning: of training runs.
        plans: what the controller of one seed decides.
        unknown: how many rows do not say what they are of.
    """

    rows: Mapping[tuple[int, str], Row] = field(default_factory=dict)
    differences: Sequence[Mapping[str, Any]] = ()
    learning: Sequence[Mapping[str, Any]] = ()
    plans: Mapping[str, Any] | None = None
    unknown: int = 0

    @staticmethod
    def at(path: Path | None) -> Published:
        """Of a page's JSON; nothing where there is none. InputError where it is broken."""
        if path is None or not path.is_file():
            return Published()
        document = read_json(path, "page of results")
        try:
            rows = [*document["rows"], *document["infeasible"]]
            return Published(
                {(row["seed"], row["cell"]): as_measured(row) for row in rows if "cell" in row},
                document["differences"],
                document.get("learning", ()),
                document.get("plans"),
                sum("cell" not in row for row in rows),
            )
        except (KeyError, TypeError, ValueError, AttributeError):
            raise InputError(
                f"'{path}' is no page of results that can be gone on from: move it away"
            ) from None

    def seeds(self, cells: Sequence[str]) -> list[int]:
        """Of which it has any of some cells."""
        return sorted({seed for seed, cell in self.rows if cell in cells})

"""Drop dead operators: what no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.ir.graph import Graph
from planner.ir.passes.structure import needed

__all__ = ["DropDead"]


@dataclass(frozen=True)
class DropDead:
    """Drop the operators that no output needs, for example the last layer of a vision encoder
    whose next-to-last hidden state is the image feature. Stock models run those all the same.
    """  # fmt: skip

    name: ClassVar[str] = "drop-dead"

    def apply(self, graph: Graph) -> Graph:
        """The graph without dead operators; a site that narrowed only those goes too."""
        kept = needed(graph)
        operators = [operator for operator in graph if operator.name in kept]
        before = {name for operator in graph for _, name in operator.narrowed_by}
        after = {name for operator in operators for _, name in operator.narrowed_by}
        gone = before - after
        return graph.replacing(operators, (s for s in graph.sites if s.name not in gone))

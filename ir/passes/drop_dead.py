"""Drop dead operators: what no output needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from planner.ir.graph import Graph
from planner.ir.structure import needed, within


@dataclass(frozen=True)
class DropDead:
    """Drop the operators that no output needs, for example the last layer of a vision encoder
    whose next-to-last hidden state is the image feature. Stock models run those all the same.
    """  # fmt: skip

    name: ClassVar[str] = "drop-dead"

    def apply(self, graph: Graph) -> Graph:
        """The graph without dead operators; a site of nothing but those goes too."""
        kept = needed(graph)
        alive = graph.replacing(operator for operator in graph if operator.name in kept)
        narrowed = {name for operator in alive for _, name in operator.narrowed_by}
        sites = (
            site
            for site in graph.sites
            if (within(alive, site) if site.kind == "layer" else site.name in narrowed)
        )
        return alive.replacing(alive.operators, sites)

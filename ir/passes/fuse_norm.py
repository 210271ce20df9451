"""Fuse a norm into the linear after it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from planner.ir.graph import Graph, Operator
from planner.ir.structure import takes_rows


@dataclass(frozen=True)
class FuseNorm:
    """Fold a norm that one linear alone reads into that linear.

    The normalised activations are then neither written nor read back. Runs after
    `FuseProjections`, which leaves one reader where query, key and value were three.
    """

    name: ClassVar[str] = "fuse-norm"

    def apply(self, graph: Graph) -> Graph:
        """The graph with ``norm_linear`` operators, named after their linears."""
        operators: dict[str, Operator] = {}
        for operator in graph:
            norm = operators.get(operator.inputs[0]) if operator.inputs else None
            if norm is not None and _foldable(norm, operator, graph):
                del operators[norm.name]
                operator = replace(operator, kind="norm_linear", inputs=norm.inputs).having(
                    count=operator.get("count", 1), norm_bias=norm.integer("bias")
                )
            operators[operator.name] = operator
        return graph.replacing(operators.values())


def _foldable(norm: Operator, linear: Operator, graph: Graph) -> bool:
    """Whether a linear takes the rows of a norm as they are, and nothing else takes them."""
    return (
        norm.kind == "norm"
        and linear.kind in ("linear", "fused_linear")
        and takes_rows(linear, graph)
        and list(graph.network[norm.name]) == [linear.name]
    )

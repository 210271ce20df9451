"""Fuse projections: linears of one module that read the same input become one."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from planner.ir.dims import Dim
from planner.ir.graph import Graph, Operator
from planner.ir.structure import redirected, takes_rows


def _key(operator: Operator) -> object:
    """Equal for linears that can run as one: query, key and value, or gate and up."""
    parent = operator.module.rpartition(".")[0]
    return (
        operator.inputs,
        operator["in"],
        parent,
        operator.part,
        operator.layer,
        operator.shape[:-1],
        operator["bias"],
        operator.narrowed_by,
    )


def _fused(members: list[Operator]) -> Operator:
    """One linear whose output is the members' outputs side by side."""
    first = members[0]
    parent = first.module.rpartition(".")[0]
    leaves = "+".join(member.module.rpartition(".")[2] for member in members)
    width = sum(member.integer("out") for member in members)
    return replace(
        first,
        name=f"{parent}.{leaves}" if parent else leaves,
        kind="fused_linear",
        module=parent,
        shape=(*first.shape[:-1], Dim(width)),
    ).having(out=width, count=len(members))


@dataclass(frozen=True)
class FuseProjections:
    """Run linears that stand side by side in one module, and read the same input, as one.

    The input is read once. FLOPs and weights stay the same, and so do sites: what narrowed each
    member narrows the fused linear, and bindings name the stock model's modules as before.
    """

    name: ClassVar[str] = "fuse-projections"

    def apply(self, graph: Graph) -> Graph:
        """The graph with query, key and value fused, gate and up fused, and the like."""
        groups: dict[object, list[Operator]] = {}
        for operator in graph:
            if operator.kind == "linear" and takes_rows(operator, graph):
                groups.setdefault(_key(operator), []).append(operator)
        together = [members for members in groups.values() if len(members) > 1]
        fused = {members[0].name: _fused(members) for members in together}
        names = {
            member.name: fused[members[0].name].name for members in together for member in members
        }
        operators = [
            fused.get(operator.name, operator)
            for operator in graph
            if operator.name not in names or operator.name in fused
        ]
        return graph.replacing(redirected(operators, names))

"""One layer of a captured module: its nodes, and where their values come from."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, fx

from planner.ir.lowering.aten import HEAVY, opname
from planner.ir.lowering.flow import Flow
from planner.ir.lowering.lanes import Label, LaneTracer


class NoSite(Exception):
    """A block that cannot be narrowed; the message says why."""


@dataclass(frozen=True)
class TracedLayer:
    """A layer between its two marks, captured with so many tokens."""

    path: str
    begin: fx.Node
    end: fx.Node
    flow: Flow
    tracer: LaneTracer
    tokens: int

    @cached_property
    def nodes(self) -> list[fx.Node]:
        """Live nodes inside, in order."""
        calls = self.flow.calls
        return calls[calls.index(self.begin) + 1 : calls.index(self.end)]

    def labels(self, node: object) -> tuple[Label, ...]:
        """Where a value's elements come from."""
        return self.tracer.of(node)

    def sink(self, source: fx.Node) -> fx.Node | None:
        """The one linear that a source's elements arrive at, None unless there is exactly one."""
        sinks = [
            node
            for node in self.nodes
            if opname(node) == "linear"
            and any(label.source is source for label in self.labels(node.args[0]))
        ]
        return sinks[0] if len(sinks) == 1 else None

    def comes_from(self, end: fx.Node, sources: Set[fx.Node]) -> bool:
        """Whether all activations that a value is computed from come from the given sources.

        What comes from elsewhere would keep its width when the sources are narrowed.
        """
        pending, seen = [end], set()
        while pending:
            node = pending.pop()
            if node in sources or node in seen:
                continue
            seen.add(node)
            if opname(node) in HEAVY or opname(node) == "mark":
                return False
            pending.extend(n for n in node.all_input_nodes if n in self.flow.live)
        return True

    def columns(self, label: Label) -> Tensor:
        """The numbers that a label gives to the features a linear reads, for one token."""
        return label.index.select(label.index.ndim - 2, 0).reshape(-1)

"""Lanes: which features of a layer's weights belong to which head or neuron, read off the graph.

Index arrays are pushed through the very view operations that the model applies to its activations:
the output of every linear carries its feature numbers, the output of every attention its head
numbers. Where they arrive at an attention operator or at the next linear they say which rows and
columns go together.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from planner.ir.graph import Block
from planner.ir.intervals import intervals_of
from planner.ir.lowering.aten import ACTIVATIONS, HEAVY, NORMS, REDUCTIONS, VIEWS, opname, upstream
from planner.ir.lowering.flow import Flow

# More labels than this on one value means that features are being mixed, not arranged.
_MOST_LABELS = 6


@dataclass(frozen=True, eq=False)
class Label:
    """Where the elements of a value come from."""

    source: fx.Node  # the linear (feature numbers) or attention (head numbers) they come from
    index: Tensor  # int32, shape of the value; -1 where an element does not come from the source
    activated: bool = False  # whether a non-linearity lies in between


@dataclass
class LaneTracer:
    """Labels of every value of a captured graph, computed in one sweep."""

    # Value -> where its elements come from.
    labels: dict[fx.Node, tuple[Label, ...]] = field(default_factory=dict)
    # (label, reduced axes) of every reduction, whose rows must each lie in one lane.
    mixed: list[tuple[Label, tuple[int, ...]]] = field(default_factory=list)

    def visit(self, node: fx.Node) -> None:
        """Propagate through one node; nodes must be visited in graph order."""
        name = opname(node)
        if name in HEAVY:
            self.labels[node] = self._start(node, name)
        elif name == "mark":
            self.labels[node] = ()
        elif name == "cat" or name == "stack":
            self.labels[node] = self._joined(node)
        elif name in VIEWS:
            self.labels[node] = self._viewed(node)
        elif name in NORMS or name in ("softmax", "log_softmax"):
            self.mixed += [(label, (-1,)) for label in self.of(node.args[0])]
            self.labels[node] = self._elementwise(node, False)
        elif name in REDUCTIONS:
            self.mixed += [(label, _axes(node)) for label in self.of(node.args[0])]
            self.labels[node] = ()
        else:
            self.labels[node] = self._elementwise(node, name in ACTIVATIONS)

    def of(self, node: Any) -> tuple[Label, ...]:
        """Labels of a value."""
        return self.labels.get(node, ()) if isinstance(node, fx.Node) else ()

    def _start(self, node: fx.Node, name: str) -> tuple[Label, ...]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ()
        shape = tuple(int(size) for size in value.shape)
        if name == "linear" and len(shape) >= 2:
            index = torch.arange(shape[-1], dtype=torch.int32).expand(shape)
        elif name == "scaled_dot_product_attention" and len(shape) == 4:
            index = torch.arange(shape[1], dtype=torch.int32).view(1, -1, 1, 1).expand(shape)
        else:
            return ()
        return (Label(node, index),)

    def _viewed(self, node: fx.Node) -> tuple[Label, ...]:
        labels = self.of(node.args[0])
        if opname(node) == "getitem":
            place: Any = node.args[1]
            return tuple(
                replace(label, index=label.index[place])
                for label in labels
                if isinstance(label.index, tuple | list)
            )
        return tuple(
            replace(label, index=moved)
            for label in labels
            if (moved := self._apply(node, label.index)) is not None
        )

    @staticmethod
    def _apply(node: fx.Node, index: Tensor) -> Tensor | None:
        """Run a view operation on an index array; type conversions leave it as it is."""
        name = opname(node)
        if name in ("to", "to_copy", "type_as", "dropout", "native_dropout", "detach", "alias",
                    "float", "half", "bfloat16", "lift_fresh_copy"):  # fmt: skip
            return index
        # A complex number carries the numbers of both its parts; float32 holds them exactly.
        if name == "view_as_complex":
            return torch.view_as_complex(index.float().contiguous())
        if name == "view_as_real":
            return torch.view_as_real(index).int()
        if any(isinstance(a, fx.Node) for a in node.args[1:]):
            return None
        target: Callable[..., Any] = node.target  # type: ignore[assignment]
        try:
            result: Tensor = target(index, *node.args[1:], **node.kwargs)
        except (RuntimeError, TypeError, ValueError):
            return None
        return result

    def _joined(self, node: fx.Node) -> tuple[Label, ...]:
        parts: Any = node.args[0]
        value = node.meta["val"]
        axis = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        join: Callable[..., Tensor] = torch.stack if opname(node) == "stack" else torch.cat
        found: list[Label] = []
        width = max((len(self.of(part)) for part in parts), default=0)
        for position in range(width):
            here = [self.of(part)[position : position + 1] for part in parts]
            for source in dict.fromkeys(label[0].source for label in here if label):
                pieces = []
                for part, label in zip(parts, here, strict=True):
                    shape = tuple(part.meta["val"].shape)
                    if label and label[0].source is source:
                        pieces.append(label[0].index.expand(shape))
                    else:
                        pieces.append(torch.full((), -1, dtype=torch.int32).expand(shape))
                index = join(pieces, axis)
                if index.shape == value.shape:
                    activated = any(label[0].activated for label in here if label)
                    found.append(Label(source, index, activated))
        return tuple(found[:_MOST_LABELS])

    def _elementwise(self, node: fx.Node, activates: bool) -> tuple[Label, ...]:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            return ()
        found: list[Label] = []
        for argument in node.args:
            for label in self.of(argument):
                try:
                    index = label.index.expand(tuple(value.shape))
                except RuntimeError:
                    continue
                activated = label.activated or activates
                if not any(
                    other.source is label.source
                    and other.activated == activated
                    and torch.equal(other.index, index)
                    for other in found
                ):
                    found.append(Label(label.source, index, activated))
        return tuple(found) if len(found) <= _MOST_LABELS else ()


def _axes(node: fx.Node) -> tuple[int, ...]:
    axes = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if isinstance(axes, int):
        return (axes,)
    if isinstance(axes, list | tuple) and all(isinstance(a, int) for a in axes):
        return tuple(axes)
    rank = node.args[0].meta["val"].ndim if isinstance(node.args[0], fx.Node) else 1
    return tuple(range(rank))


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

    @cached_property
    def hands_on(self) -> bool:
        """Whether others read what it computes from weights alone, beside hidden states.

        T5's first layer makes the biases by distance that all layers add.
        """
        captured = self.flow.captured
        nodes = list(captured.graph.nodes)
        inside = nodes[nodes.index(self.begin) + 1 : nodes.index(self.end)]
        made = {node for node in nodes if node.op == "placeholder"} & {
            node for node in nodes if node.name in captured.parameters
        }
        for node in inside:
            if node not in self.flow.live and any(n in made for n in node.all_input_nodes):
                made.add(node)
        readers = {user for node in inside if node in made for user in node.users}
        return any(user.op == "call_function" for user in readers - {*inside, self.end})

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
        inside = {end} | self.flow.live
        met = upstream(end, lambda node: node in inside and node not in sources)
        others = met.keys() & inside - sources
        return not any(opname(node) in HEAVY or opname(node) == "mark" for node in others)

    def columns(self, label: Label) -> Tensor:
        """The numbers that a label gives to the features a linear reads, for one token."""
        return label.index.select(label.index.ndim - 2, 0).reshape(-1)


def affine_blocks(features: list[list[int]]) -> tuple[Block, ...] | None:
    """Express the features of each lane as blocks ``offset + lane*stride``, or None."""
    lanes = [intervals_of(sorted(set(lane))) for lane in features]
    if not lanes or not lanes[0] or any(len(lane) != len(lanes[0]) for lane in lanes):
        return None
    blocks = []
    for position, (start, stop) in enumerate(lanes[0]):
        stride = lanes[1][position][0] - start if len(lanes) > 1 else stop - start
        for number, lane in enumerate(lanes):
            if lane[position] != (start + number * stride, stop + number * stride):
                return None
        blocks.append(Block(start, stride, stop - start))
    return tuple(blocks)

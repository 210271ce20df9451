"""Rewriting: blocks of a captured graph become planner's ops, which read a model's board.

Products of projections compute the rows of surviving heads, attention and its output projection
become one op, and so does an MLP. Norms, rotations, caches and residual additions stay as they are,
for inductor to fuse. A block that no op computes is masked instead: right, but not faster.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

import planner.kernels.head_ops  # noqa: F401 - registers the ops
from planner.backend.blocks import (
    Attention,
    Linears,
    Mlp,
    Product,
    Unmatched,
    match_attention,
    match_mlp,
    value_of,
)
from planner.backend.board import Board
from planner.kernels.library import pack_mlp
from planner.kernels.records import MLPWeights, Survivors, neuron_width
from planner.models.running.bindings import BoundSite

__all__ = ["rewritten"]


# TorchDynamo's own note, on its graphs, of where their tensors come from.
_SOURCES = "_param_name_to_source"


def rewritten(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], board: Board
) -> tuple[fx.GraphModule | None, list[str]]:
    """A captured graph that obeys a model's board.

    Args:
        graph_module: as TorchDynamo captured it, of the whole model or any part of it; left as it
            is.
        example_inputs: what it was captured with.
        board: of the model.

    Returns:
        The graph, None where it has nothing to obey; and what is not skipped though plans say so,
        and why, one sentence each.
    """
    graph_module = _copied(graph_module)
    linears = Linears(graph_module, example_inputs)
    rewriter = _Rewriter(graph_module, board)
    notes: list[str] = []
    for layer in board.layers:
        for site in (layer.heads, layer.mlp):
            if site is None or not board.switches(site):
                continue
            sink = linears.find(site.sink)
            if sink is None:
                if linears.holds(site.sink):
                    notes.append(f"{site.site.module} runs dense: it has no one last product")
                continue
            try:
                if site.site.kind == "heads":
                    rewriter.attention(site, sink, match_attention(site, sink, linears))
                else:
                    rewriter.mlp(site, sink, match_mlp(site, sink, linears))
            except Unmatched as why:
                rewriter.mask(site, sink)
                notes.append(f"{site.site.module} is masked, which saves no time: {why}")
    if not rewriter.buffers:
        return None, notes
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, notes


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Another graph that reads the same parameters."""
    copied = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    copied.meta = dict(graph_module.meta)
    # Where inputs and parameters come from, as TorchDynamo notes it for inductor.
    if hasattr(graph_module, _SOURCES):
        setattr(copied, _SOURCES, dict(getattr(graph_module, _SOURCES)))
    for node, other in zip(graph_module.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(node, "_dynamo_source"):
            other._dynamo_source = node._dynamo_source
    return copied


class _Rewriter:
    """Inserts ops, and the buffers they read, into one graph."""

    def __init__(self, graph_module: fx.GraphModule, board: Board) -> None:
        self.module, self.graph, self.board = graph_module, graph_module.graph, board
        self.buffers: set[str] = set()

    def attention(self, site: BoundSite, sink: Product, block: Attention) -> None:
        """Narrow the projections in place; attention and output projection become one op."""
        dials = self._survivors(site, sink)
        by_input: dict[fx.Node, list[tuple[Product, tuple[slice, ...]]]] = {}
        for product, pieces in block.projections:
            by_input.setdefault(product.x, []).append((product, pieces))
        for x, products in by_input.items():
            self._project(x, products, dials)
        with self.graph.inserting_before(sink.node):
            attended = self.graph.call_function(
                torch.ops.planner.attend_heads.default,
                (
                    block.query,
                    block.key,
                    block.value,
                    block.mask,
                    sink.weight,
                    dials["units"],
                    dials["counts"],
                    block.scale,
                    block.causal,
                ),
            )
            result = self._biased(site, sink, attended)
        self._replace(sink.node, result, block.inner)

    def _project(
        self,
        x: fx.Node,
        products: Sequence[tuple[Product, tuple[slice, ...]]],
        dials: dict[str, fx.Node],
    ) -> None:
        """Products that read the same input become one op."""
        first = min(products, key=lambda pair: self._place(pair[0].node))[0].node
        with self.graph.inserting_before(first):
            rows = [(product, piece) for product, pieces in products for piece in pieces]
            weights = [self._rows(product.weight, piece) for product, piece in rows]
            biases = [self._rows(p.bias, piece) for p, piece in rows if p.bias is not None]
            biased = [product.bias is not None for product, _ in rows]
            survivors = (dials["units"], dials["counts"])
            projected = self.graph.call_function(
                torch.ops.planner.project_heads.default, (x, weights, biases, biased, *survivors)
            )
            parts = [
                self.graph.call_function(operator.getitem, (projected, i))
                for i in range(len(weights))
            ]
            results = []
            for _, pieces in products:
                own, parts = parts[: len(pieces)], parts[len(pieces) :]
                joined = self.graph.call_function(torch.cat, (own, -1)) if len(own) > 1 else own[0]
                results.append(joined)
        for (product, _), result in zip(products, results, strict=True):
            self._replace(product.node, result)

    def mlp(self, site: BoundSite, sink: Product, block: Mlp) -> None:
        """The MLP becomes one op."""
        dials = self._survivors(site, sink)
        with self.graph.inserting_before(sink.node):
            tensors: dict[str, Any] = {}
            for name, rows in (("up", block.up), ("gate", block.gate)):
                if rows is not None:
                    product, piece = rows
                    tensors[name] = self._rows(product.weight, piece)
                    if product.bias is not None:
                        tensors[f"{name}_bias"] = self._rows(product.bias, piece)
            down: Any = sink.weight
            weights = MLPWeights(down=down, activation=block.activation, **tensors)
            width = neuron_width(site.site.lanes)
            nodes: Any = dials
            survivors = Survivors(nodes["units"], nodes["counts"], width, nodes["lanes"])
            hidden: Any = block.x
            arguments = pack_mlp(hidden, weights, survivors, None)
            narrowed = self.graph.call_function(torch.ops.planner.mlp.default, arguments)
            result = self._biased(site, sink, narrowed)
        sources = {rows[0].node: None for rows in (block.up, block.gate) if rows is not None}
        self._replace(sink.node, result, (*sources, *block.inner))

    def mask(self, site: BoundSite, sink: Product) -> None:
        """Everything is computed, and what does not survive is multiplied by zero."""
        mask = self._buffer(f"{site.site.name}.mask", self.board.mask(site, value_of(sink.weight)))
        with self.graph.inserting_before(sink.node):
            masked = self.graph.call_function(operator.mul, (sink.x, mask))
            product = self.graph.call_function(
                torch.nn.functional.linear, (masked, sink.weight, None)
            )
            result = self._biased(site, sink, product)
        self._replace(sink.node, result)

    # -- parts -------------------------------------------------------------------------------

    def _biased(self, site: BoundSite, sink: Product, product: fx.Node) -> fx.Node:
        """With the bias of the last linear, unless the layer is off."""
        if sink.bias is None:
            return product
        on = self.board.on(site.site.layer, value_of(sink.weight))
        flag = self._buffer(f"layer.{site.site.layer}.on", on)
        bias = self.graph.call_function(operator.mul, (sink.bias, flag))
        return self.graph.call_function(operator.add, (product, bias))

    def _survivors(self, site: BoundSite, sink: Product) -> dict[str, fx.Node]:
        tensors = self.board.survivors(site, value_of(sink.weight).device)
        return {n: self._buffer(f"{site.site.name}.{n}", t) for n, t in tensors.items()}

    def _buffer(self, name: str, tensor: Tensor) -> fx.Node:
        """A node that reads one of the board's tensors."""
        name = "planner_" + name.replace(".", "_")
        if name not in self.buffers:
            self.buffers.add(name)
            self.module.register_buffer(name, tensor)
            sources = getattr(self.module, _SOURCES, None)
            if sources is not None:
                sources[name] = ConstantSource(name)
        with self.graph.inserting_before(next(iter(self.graph.nodes))):
            return self.graph.get_attr(name)

    def _rows(self, parameter: fx.Node, rows: slice) -> fx.Node:
        """Rows of a parameter; of all of them the parameter itself."""
        if (rows.start, rows.stop) == (0, int(value_of(parameter).shape[0])):
            return parameter
        return self.graph.call_function(operator.getitem, (parameter, rows))

    def _place(self, node: fx.Node) -> int:
        return next(place for place, other in enumerate(self.graph.nodes) if other is node)

    def _replace(self, node: fx.Node, by: fx.Node, inner: Sequence[fx.Node] = ()) -> None:
        """Read `by` where `node` was read; remove it, and the nodes that it alone depended on."""
        by.meta["example_value"] = value_of(node)
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)
        for dead in reversed(inner):
            self.graph.erase_node(dead)

"""Rewriting: blocks of a captured graph become planner's ops, which read a plan's tensors.

Products of projections compute the rows of surviving heads; attention, output projections and both
halves of an MLP read survivors alone. Norms, rotations, caches and residual additions stay as they
are, for inductor to fuse. A block that no op computes is masked instead: right, but not faster.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

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
from planner.backend.plan_tensors import PlanTensor, PlanTensors
from planner.kernels.choice import Kernels, with_triton
from planner.kernels.ops.attend import Attend
from planner.kernels.ops.op import Op
from planner.kernels.ops.project_columns import ProjectColumns
from planner.kernels.ops.project_rows import ProjectRows
from planner.kernels.survivors import Survivors, neuron_width
from planner.models.running.bindings import BoundSite


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A captured graph that obeys plans: it takes some tensors of a plan behind its own inputs."""

    graph: fx.GraphModule | None  # None where it has nothing to obey
    tensors: tuple[PlanTensor, ...]
    # Place of an input that the weight of a site's last linear is -> the site's name.
    places: Mapping[int, str]
    # One sentence each: what is masked though plans leave it out; by site, what not even that.
    masked: tuple[str, ...]
    whole: Mapping[str, str]


def rewritten(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], plans: PlanTensors
) -> Rewritten:
    """A captured graph, of a whole model or any part of it, as another one that obeys plans."""
    graph_module = _copied(graph_module)
    linears = Linears(graph_module, example_inputs)
    rewriter = _Rewriter(graph_module, plans.options.kernels)
    masked: list[str] = []
    whole: dict[str, str] = {}
    places: dict[int, str] = {}
    for layer in plans.session.layers:
        for site in (layer.heads, layer.mlp):
            if site is None or not plans.has(site):
                continue
            sink = linears.find(site.sink)
            if sink is None:
                if linears.holds(site.sink):
                    whole[site.site.name] = f"{site.site.module} has no one last product"
                continue
            place = linears.place_of(site.sink)
            if place is not None:
                places[place] = site.site.name
            try:
                if site.site.kind == "heads":
                    rewriter.attention(site, sink, match_attention(site, sink, linears))
                else:
                    rewriter.mlp(site, sink, match_mlp(site, sink, linears))
            except Unmatched as why:
                rewriter.mask(site, sink)
                masked.append(f"{site.site.module} is masked, which saves no time: {why}")
    if not rewriter.inputs:
        return Rewritten(None, (), {}, (), whole)
    graph_module.graph.lint()
    graph_module.recompile()
    return Rewritten(graph_module, tuple(rewriter.inputs), places, tuple(masked), whole)


def _copied(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Another graph that reads the same parameters."""
    copied = fx.GraphModule(graph_module, copy.deepcopy(graph_module.graph))
    copied.meta = dict(graph_module.meta)
    # Where parameters and inputs come from, as TorchDynamo notes it for inductor.
    if hasattr(graph_module, "_param_name_to_source"):
        copied._param_name_to_source = graph_module._param_name_to_source
    for node, other in zip(graph_module.graph.nodes, copied.graph.nodes, strict=True):
        if hasattr(node, "_dynamo_source"):
            other._dynamo_source = node._dynamo_source
    return copied


class _Rewriter:
    """Inserts ops, and the tensors of plans that they read, into one graph."""

    def __init__(self, graph_module: fx.GraphModule, kernels: Kernels) -> None:
        self.graph, self.kernels = graph_module.graph, kernels
        # What stands for each tensor, in the order of the graph's inputs.
        self.inputs: dict[PlanTensor, fx.Node] = {}
        self.triton = False

    def attention(self, site: BoundSite, sink: Product, block: Attention) -> None:
        """Narrow the projections where they stand, the attention, and the output projection."""
        heads = self._survivors(site, sink)
        for product, pieces in block.projections:
            self._project(product, pieces, heads, site.site.lanes)
        with self.graph.inserting_before(sink.node):
            fused = value_of(sink.x).dtype
            operands = [self._cast(n, fused) for n in (block.query, block.key, block.value)]
            mask = block.mask if _is_bool(block.mask) else self._cast(block.mask, fused)
            attended = self._call(Attend, *operands, mask, heads, block.scale, block.causal)
            rows = self._cast(self.graph.call_method("flatten", (attended, 2)), _of(sink), fused)
            features = heads.widened(sink.bound.features // site.site.lanes)
            weight = self._cast(sink.weight, _of(sink))
            narrowed = self._call(ProjectColumns, rows, weight, None, features)
            result = self._biased(site, sink, narrowed)
        self._replace(sink.node, result, block.inner)

    def _project(
        self, product: Product, pieces: Sequence[slice], heads: Survivors, lanes: int
    ) -> None:
        """A projection becomes an op for each piece of its rows."""
        with self.graph.inserting_before(product.node):
            parts, x = [], self._cast(product.x, _of(product))
            for piece in pieces:
                weight, bias = self._weights((product, piece))
                features = heads.widened((piece.stop - piece.start) // lanes)
                parts.append(self._call(ProjectRows, x, weight, bias, features, False))
            joined = self.graph.call_function(torch.cat, (parts, -1)) if len(parts) > 1 else None
        self._replace(product.node, joined or parts[0])

    def mlp(self, site: BoundSite, sink: Product, block: Mlp) -> None:
        """The MLP becomes two ops."""
        neurons = self._survivors(site, sink)
        with self.graph.inserting_before(sink.node):
            up, gate = self._weights(block.up), self._weights(block.gate)
            further = (neurons, True, *gate, block.activation)
            x, before = self._cast(block.x, _of(block.up[0])), _of(block.up[0])
            inner = self._cast(self._call(ProjectRows, x, *up, *further), _of(sink), before)
            weight = self._cast(sink.weight, _of(sink))
            narrowed = self._call(ProjectColumns, inner, weight, None, neurons)
            result = self._biased(site, sink, narrowed)
        sources = {rows[0].node: None for rows in (block.up, block.gate) if rows is not None}
        self._replace(sink.node, result, (*sources, *block.inner))

    def mask(self, site: BoundSite, sink: Product) -> None:
        """Everything is computed, and what does not survive is multiplied by zero."""
        mask = self._input("mask", site, value_of(sink.weight))
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
        on = self._input("on", site, value_of(sink.weight))
        bias = self.graph.call_function(operator.mul, (sink.bias, on))
        bias = self._cast(bias, _of(sink), value_of(sink.weight).dtype)
        return self.graph.call_function(operator.add, (product, bias))

    def _call(self, op: Callable[..., Op], *inputs: Any) -> Any:
        """A node that computes an op of nodes."""
        call = op(*inputs)
        return self.graph.call_function(call.overload, call.flat(self.triton))

    def _survivors(self, site: BoundSite, sink: Product) -> Survivors:
        """Survivors of a site, whose tensors are nodes."""
        like = value_of(sink.weight)
        self.triton = with_triton(self.kernels, like.device)
        units, counts = self._input("units", site, like), self._input("counts", site, like)
        is_mlp = site.site.kind == "mlp"
        width = neuron_width(site.site.lanes) if is_mlp else 1
        lanes = self._input("lanes", site, like) if is_mlp else None
        nodes: Any = (units, counts, width, lanes)
        return Survivors(*nodes)

    def _input(self, kind: str, site: BoundSite, like: Tensor) -> fx.Node:
        """An input of the graph that stands for a plan's tensor."""
        dtype = like.dtype if kind in ("mask", "on") else None
        wanted = PlanTensor(kind, site.site.layer, site.site.kind, like.device, dtype)
        if wanted not in self.inputs:
            last = [node for node in self.graph.nodes if node.op == "placeholder"][-1]
            with self.graph.inserting_after(last):
                node = self.graph.placeholder(f"plan_{kind}_{site.site.kind}_{site.site.layer}")
            node._dynamo_source = ConstantSource(node.name)
            self.inputs[wanted] = node
        return self.inputs[wanted]

    def _weights(self, rows: tuple[Product, slice] | None) -> tuple[Any, Any]:
        """Weight and bias of some rows of a product; None where there are none."""
        if rows is None:
            return None, None
        product, piece = rows
        weight, bias = (
            None
            if parameter is None
            else self._cast(self._rows(parameter, piece), _of(product), value_of(parameter).dtype)
            for parameter in (product.weight, product.bias)
        )
        return weight, bias

    def _cast(self, node: Any, dtype: torch.dtype, known: torch.dtype | None = None) -> Any:
        """A tensor as what a product or an attention computed with, which autocast decides.

        `known`: its type, of a node that was not captured.
        """
        if node is None or dtype == (known or value_of(node).dtype):
            return node
        return self.graph.call_method("to", (node, dtype))

    def _rows(self, parameter: fx.Node, rows: slice) -> fx.Node:
        """Rows of a parameter; of all of them the parameter itself."""
        if (rows.start, rows.stop) == (0, int(value_of(parameter).shape[0])):
            return parameter
        return self.graph.call_function(operator.getitem, (parameter, rows))

    def _replace(self, node: fx.Node, by: fx.Node, inner: Sequence[fx.Node] = ()) -> None:
        """Read `by` where `node` was read; remove it, and the nodes that it alone depended on."""
        by.meta["example_value"] = value_of(node)
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)
        for dead in reversed(inner):
            self.graph.erase_node(dead)


def _of(product: Product) -> torch.dtype:
    """What a product was computed in."""
    dtype: torch.dtype = value_of(product.node).dtype
    return dtype


def _is_bool(mask: fx.Node | None) -> bool:
    return mask is not None and value_of(mask).dtype == torch.bool

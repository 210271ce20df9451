"""Plain products: a product with a weight that is stored transposed becomes a linear.

GPT-2's ``Conv1D`` multiplies its rows, all samples' in one, by a weight of shape (in, out). In the
captured graph it is replaced by ``linear`` with the transposed weight, so that all projections look
alike from there on.
"""

from __future__ import annotations

from collections.abc import Container

import torch
from torch import fx

from planner.ir.lowering.aten import opname


def use_linear(graph: fx.Graph, weights: Container[str]) -> None:
    """Replace every such product of a captured graph, in place.

    Args:
        graph: nodes with ``meta["val"]``.
        weights: names of the placeholders that are parameters.
    """
    for product in [n for n in graph.nodes if opname(n) in ("mm", "addmm") and not n.kwargs]:
        *bias, rows, weight = product.args
        stored = [n.name for n in (weight, *bias) if isinstance(n, fx.Node)]
        if not all(name in weights for name in stored):
            continue
        assert isinstance(weight, fx.Node)
        with graph.inserting_before(product):
            turned = graph.call_function(torch.ops.aten.t.default, (weight,))
            linear = graph.call_function(torch.ops.aten.linear.default, (rows, turned, *bias))
        turned.meta = {**weight.meta, "val": weight.meta["val"].t()}
        linear.meta = dict(product.meta)
        product.replace_all_uses_with(linear)

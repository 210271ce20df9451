"""Rewrites of a captured graph, in place, so that what follows meets one form of each operation.

Nodes have ``meta["val"]``.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import Any

import torch
from torch import Tensor, fx

from planner.ir.lowering.aten import HEAVY, VIEWS, opname, upstream

# Key of a fused attention's meta: its scores go through tanh.
CAPPED = "planner_capped"
# Key of a product's meta: another node computes it now.
REPLACED = "planner_replaced"
_PRODUCTS = frozenset(["matmul", "bmm", "baddbmm"])
# New tensors of an activation's size, for masks.
_CREATIONS = frozenset(
    ["zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full"]
)
_EMPTY = frozenset(["empty", "empty_like", "new_empty"])


def use_linear(graph: fx.Graph, weights: Container[str]) -> None:
    """Products with a weight stored transposed, as GPT-2's ``Conv1D`` has it, become linears.

    So do those with a weight that is transposed in place (Falcon). `weights` are the names of the
    placeholders that are parameters.
    """
    for product in [n for n in graph.nodes if opname(n) in ("mm", "addmm", "matmul")]:
        *bias, rows, weight = product.args
        stored = [_viewed(n).name for n in (weight, *bias) if isinstance(n, fx.Node)]
        is_matrix = isinstance(weight, fx.Node) and weight.meta["val"].ndim == 2
        if product.kwargs or not is_matrix or not all(name in weights for name in stored):
            continue
        with graph.inserting_before(product):
            turned = graph.call_function(torch.ops.aten.t.default, (weight,))
            linear = graph.call_function(torch.ops.aten.linear.default, (rows, turned, *bias))
        turned.meta = {**weight.meta, "val": weight.meta["val"].t()}
        linear.meta = dict(product.meta)
        product.replace_all_uses_with(linear)
        graph.erase_node(product)


def _viewed(node: fx.Node) -> fx.Node:
    """What a node is a view of."""
    while node.op == "call_function" and opname(node) in VIEWS:
        node = node.all_input_nodes[0]
    return node


def join_writes(graph: fx.Graph) -> None:
    """A tensor created empty and then written part by part becomes a concatenation.

    Latent attention assembles its keys so, which would not be seen to reach the tensor's readers.
    """
    order = {node: position for position, node in enumerate(graph.nodes)}
    for empty in [n for n in graph.nodes if n.op == "call_function" and opname(n) in _EMPTY]:
        slices = {user for user in empty.users if _write(user) is not None}
        axes = {_axis(part) for part in slices}
        spans = sorted(_span(part, empty) for part in slices)
        size = empty.meta["val"].shape[axes.copy().pop()] if len(axes) == 1 else None
        ends = [0, *(stop for _, stop in spans)]
        if ends[-1] != size or [start for start, _ in spans] != ends[:-1]:
            continue
        writes = [_write(part) for part in sorted(slices, key=lambda p: _span(p, empty))]
        last = max((write for write in writes if write is not None), key=lambda w: order[w])
        with graph.inserting_after(last):
            parts = [write.args[1] for write in writes if write is not None]
            joined = graph.call_function(torch.ops.aten.cat.default, (parts, axes.pop()))
        joined.meta = dict(empty.meta)
        empty.replace_all_uses_with(
            joined, delete_user_cb=lambda user, kept=slices: user not in kept
        )


def _write(part: fx.Node) -> fx.Node | None:
    """The copy into a slice, where that is all the slice is for and nothing is broadcast."""
    if opname(part) != "slice" or len(part.users) != 1:
        return None
    (write,) = part.users
    if opname(write) != "copy_" or write.args[0] is not part:
        return None
    value = write.args[1]
    shapes = [n.meta["val"].shape for n in (part, value) if isinstance(n, fx.Node)]
    return write if len(shapes) == 2 and shapes[0] == shapes[1] else None


def _axis(part: fx.Node) -> int:
    axis: Any = part.args[1] if len(part.args) > 1 else 0
    return int(axis) % len(part.meta["val"].shape)


def _span(part: fx.Node, whole: fx.Node) -> tuple[int, int]:
    """First and last feature (exclusive) of a slice."""
    start: Any = part.args[2] if len(part.args) > 2 else 0
    axis = _axis(part)
    first = int(start or 0) % max(1, int(whole.meta["val"].shape[axis]))
    return first, first + int(part.meta["val"].shape[axis])


def fuse_attention(graph: fx.Graph, activations: Container[str]) -> None:
    """A softmax between two products becomes one fused attention.

    Models that no fused attention fits (logits that are capped, say) compute them one by one.
    `activations` are the names of the placeholders that carry activations.
    """
    reached = _reached(graph, activations)
    for softmax in [n for n in graph.nodes if n.op == "call_function" and opname(n) == "softmax"]:
        scores, output = _scores(softmax, reached), _output(softmax)
        if scores is None or output is None or not _fit(scores, output):
            continue
        # `baddbmm` takes what is added first.
        query, keys = scores.args[-2:]
        output.meta[CAPPED] = _is_capped(softmax, scores)
        with graph.inserting_before(output):
            fused = _fused(graph, output, query, keys, output.args[1])
        output.replace_all_uses_with(fused)
        scores.meta[REPLACED] = output.meta[REPLACED] = True


def _fused(graph: fx.Graph, output: fx.Node, query: Any, keys: Any, value: Any) -> fx.Node:
    """Fused attention in the place of the product of probabilities and values."""
    operands = [query, _applied(graph, torch.ops.aten.transpose.int, keys, -2, -1), value]
    result = output.meta["val"]
    if result.ndim == 3:
        operands = [_applied(graph, torch.ops.aten.unsqueeze.default, n, 0) for n in operands]
    fused = graph.call_function(
        torch.ops.aten.scaled_dot_product_attention.default, tuple(operands)
    )
    fused.meta = {**output.meta, "val": result if result.ndim == 4 else result.unsqueeze(0)}
    return fused if result.ndim == 4 else _applied(graph, torch.ops.aten.squeeze.dim, fused, 0)


def _applied(graph: fx.Graph, view: Callable[..., Any], node: fx.Node, *args: int) -> fx.Node:
    """A view of a value, as a node of the graph."""
    viewed = graph.call_function(view, (node, *args))
    viewed.meta = {**node.meta, "val": view(node.meta["val"], *args)}
    return viewed


def _reached(graph: fx.Graph, activations: Container[str]) -> set[fx.Node]:
    """Nodes that depend on activations; masks and positions do not."""
    reached: set[fx.Node] = set()
    for node in graph.nodes:
        if opname(node) in _CREATIONS:
            continue
        entering = node.op == "placeholder" and node.name in activations
        if entering or opname(node) == "mark" or any(n in reached for n in node.all_input_nodes):
            reached.add(node)
    return reached


def _scores(softmax: fx.Node, reached: set[fx.Node]) -> fx.Node | None:
    """The one product that a softmax is taken of, through elementwise work."""

    def passes(node: fx.Node) -> bool:
        ends = node.op == "placeholder" or opname(node) in HEAVY or opname(node) == "mark"
        return node in reached and not ends

    met = upstream(softmax, passes)
    products = [node for node in met if node in reached and not passes(node)]
    if len(products) != 1 or opname(products[0]) not in _PRODUCTS:
        return None
    (product,) = products
    # What `baddbmm` adds may be a bias, not another product.
    return product if len(product.args) == 2 or product.args[0] not in reached else None


def _is_capped(softmax: fx.Node, scores: fx.Node) -> bool:
    """Whether the work between scores and softmax bounds the scores."""
    between = upstream(softmax, lambda node: node is not scores)
    return any(opname(node) == "tanh" for node in between)


def _output(softmax: fx.Node) -> fx.Node | None:
    """The product of probabilities and values."""
    node = softmax
    while True:
        # Assertions that the tracer leaves behind have no readers.
        readers = [user for user in node.users if user.users]
        if len(readers) != 1:
            return None
        (user,) = readers
        if user.op == "call_function" and opname(user) in _PRODUCTS:
            return user if user.args[0] is node else None
        if opname(user) not in VIEWS:
            return None
        node = user


def _fit(scores: fx.Node, output: fx.Node) -> bool:
    """Whether both are products of (samples, heads, tokens, features), over the same keys.

    Of one sample, the first dimension may be missing.
    """
    operands = [*scores.args[-2:], output.args[1], scores, output]
    values: list[Any] = [n.meta.get("val") for n in operands if isinstance(n, fx.Node)]
    ranks = {v.ndim if isinstance(v, Tensor) else 0 for v in values}
    if len(values) < 5 or ranks not in ({3}, {4}):
        return False
    query, keys, value, score, result = (tuple(v.shape) for v in values)
    samples_and_heads = {shape[:-2] for shape in (query, keys, value, score, result)}
    return len(samples_and_heads) == 1 and keys[-1] == value[-2] and query[-2] == result[-2]

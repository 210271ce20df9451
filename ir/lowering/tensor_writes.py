"""Writes: a tensor created empty and then written part by part becomes a concatenation.

Latent attention assembles its keys so, which would not be seen to reach the tensor's readers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from planner.ir.lowering.aten import opname

_EMPTY = frozenset(["empty", "empty_like", "new_empty"])


def join_writes(graph: fx.Graph) -> None:
    """Replace every such tensor of a captured graph, in place."""
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

"""Grouping: nodes of a norm, an activation, a rotation or a recurrence become one operator."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from planner.ir.lowering.aten import ACTIVATIONS, ATTENTION, HEAVY, NORMS, VIEWS, opname, upstream
from planner.ir.lowering.flow import Flow, is_light

# Products that may be of two activations; a recurrence is made of those.
_PRODUCTS = (HEAVY - ATTENTION) - {"linear", "addmm", "grouped_mm", "grouped_mm_fallback"}


@dataclass(frozen=True)
class Group:
    """Nodes that become one operator, which stands where the last of them does.

    `suffix` is what its name ends in besides its module's path, "" for the usual.
    """

    kind: str
    nodes: tuple[fx.Node, ...]
    suffix: str = ""


def group_nodes(flow: Flow, recurrences: bool) -> dict[fx.Node, Group]:
    """Node -> the group it belongs to; other nodes are operators of their own.

    Recurrences are looked for in decoders.
    """
    by_call: dict[str, list[fx.Node]] = {}
    for node in flow.calls:
        by_call.setdefault(flow.module(node)[0], []).append(node)
    groups: dict[fx.Node, Group] = {}

    def claim(group: Group) -> None:
        groups.update(dict.fromkeys(group.nodes, group))

    for members in by_call.values():
        if (leaf := _leaf(flow, members)) is not None:
            claim(leaf)
    for node in flow.calls:
        if opname(node) in ATTENTION:
            for rotary in _rotations(flow, node, groups):
                claim(rotary)
    for members in by_call.values() if recurrences else ():
        for scan in _scans(flow, members, groups):
            claim(scan)
    return groups


def _leaf(flow: Flow, members: list[fx.Node]) -> Group | None:
    """All nodes of one call of a module without children: a norm or an activation."""
    _, path = flow.module(members[0])
    if path not in flow.captured.leaves or not all(map(is_light, members)):
        return None
    names = {opname(n) for n in members if opname(n) not in VIEWS}
    if names & (NORMS | {"rsqrt"}) or ("mean" in names and names & {"sqrt", "div"}):
        return Group("norm", tuple(members))
    if names & ACTIVATIONS:
        return Group("activation", tuple(members))
    return None


def _rotations(flow: Flow, attention: fx.Node, groups: dict[fx.Node, Group]) -> list[Group]:
    """Light work between the projections and the attention: rotation by position."""
    found: list[Group] = []
    calls = set(flow.calls)

    def is_free(node: fx.Node) -> bool:
        known = node in groups or any(node in group.nodes for group in found)
        return not known and node in calls and is_light(node)

    for argument, letter in zip(attention.args[:2], "qk", strict=False):
        members = upstream(argument, is_free) if isinstance(argument, fx.Node) else {}
        chain = [n for n in flow.calls if n in members and is_free(n)]
        # A value that others read as well stays an operator of its own.
        while (last := _read_outside(flow, chain, attention)) is not None:
            chain = chain[last + 1 :]
        work = [n for n in chain if opname(n) not in VIEWS and opname(n) != "cat"]
        # A single operation is no rotation but scaling, say.
        if len(work) > 1:
            found.append(Group("rotary", tuple(chain), f"rotary_{letter}"))
    return found


def _read_outside(flow: Flow, chain: list[fx.Node], end: fx.Node) -> int | None:
    """Position of the first node of a chain that other nodes than the chain and `end` read."""
    members = {*chain, end}
    for position, node in enumerate(chain[:-1]):
        if any(user in flow.live and user not in members for user in node.users):
            return position
    return None


def _scans(flow: Flow, members: list[fx.Node], groups: dict[fx.Node, Group]) -> list[Group]:
    """Runs of work around products of activations, without softmax: a recurrence.

    A run must not enclose a node of another module, or a product with a weight.
    """
    names = {opname(n) for n in members}
    if names & (ATTENTION | {"softmax"}) or not names & _PRODUCTS:
        return []
    order = {node: position for position, node in enumerate(flow.calls)}
    free = [node for node in members if node not in groups and _may_recur(flow, node)]
    runs: list[list[fx.Node]] = []
    for node in free:
        if runs and order[node] == order[runs[-1][-1]] + 1:
            runs[-1].append(node)
        else:
            runs.append([node])
    return [
        Group("scan", tuple(run), "scan")
        for run in runs
        if any(opname(n) in _PRODUCTS for n in run)
    ]


def _may_recur(flow: Flow, node: fx.Node) -> bool:
    """Whether a node may be part of a recurrence: light work, or a product without a weight.

    Convolutions over time are part of it, although they have one.
    """
    name = opname(node)
    if name not in _PRODUCTS:
        return is_light(node)
    return name == "conv1d" or flow.weight(node) is None

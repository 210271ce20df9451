"""Sites of one captured layer: the layer itself, its heads, its neurons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor, fx

from planner.ir.graph import Binding, Block, Site
from planner.ir.lowering.assignment import Assignment
from planner.ir.lowering.aten import ATTENTION, opname
from planner.ir.lowering.lanes import Label, NoSite, TracedLayer, affine_blocks


@dataclass
class Found:
    """What can be narrowed in one traced layer."""

    sites: list[Site] = field(default_factory=list)  # named by their kind only
    # Node -> pairs (attribute or ``shape.i``, kind of the site that narrows it).
    narrowed: dict[fx.Node, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    # Attention node -> its number of KV heads.
    kv_lanes: dict[fx.Node, int] = field(default_factory=dict)
    # Why a block cannot be narrowed, one sentence each.
    reasons: list[str] = field(default_factory=list)


def find_sites(layer: TracedLayer) -> Found:
    """Find what can be narrowed in one traced layer.

    Whether the layer can be left out is seen in the whole Graph (`whole_model`).
    """
    found = Found()
    if layer.hands_on:
        found.reasons.append(f"{layer.path}: others read what it computes from its own weights")
    else:
        found.sites.append(Site("layer", "layer", 0, layer.path))
        _add_heads(layer, found)
    try:
        _add_neurons(layer, found)
    except NoSite as why:
        found.reasons.append(f"{layer.path}: {why}")
    return found


def _add_heads(layer: TracedLayer, found: Found) -> None:
    # Attention among the states of one token has the tokens where heads stand.
    attentions = [
        node
        for node in layer.nodes
        if opname(node) in ATTENTION and int(node.meta["val"].shape[1]) % layer.tokens
    ]
    # Beside attention to an encoder's output, the attention among the layer's own tokens.
    own = [node for node in attentions if _keys(node) % layer.tokens == 0]
    if len(attentions) > 1 and own:
        attentions = own
    if len(attentions) > 1:
        found.reasons.append(f"{layer.path}: {len(attentions)} attention operators in one layer")
    if len(attentions) != 1:
        return
    (attention,) = attentions
    try:
        grouping = _group_heads(layer, attention)
        found.kv_lanes[attention] = grouping.lanes
        _find_heads(layer, attention, grouping, found)
    except NoSite as why:
        path = layer.flow.module(attention)[1] or layer.path
        found.reasons.append(f"{path}: {why}")


@dataclass(frozen=True)
class _Grouping:
    """Heads that read the same keys and values form one group: a lane.

    `of_key` gives the lane of each key head, `of_head` that of each query head.
    """

    of_key: list[int]
    of_head: list[int]
    lanes: int


def _operands(attention: fx.Node) -> tuple[fx.Node, fx.Node, fx.Node]:
    query, key, value = cast(tuple[fx.Node, ...], attention.args[:3])
    return query, key, value


def _keys(attention: fx.Node) -> int:
    return int(_operands(attention)[1].meta["val"].shape[-2])


def _per_head(label: Label, heads: int) -> list[list[int]]:
    """Feature numbers of each head, for one token; the label's value is (1, heads, tokens, d)."""
    index = label.index.select(2, 0).movedim(1, 0).reshape(heads, -1)
    return [sorted(set(row[row >= 0].tolist())) for row in index.unbind(0)]


def _group_heads(layer: TracedLayer, attention: fx.Node) -> _Grouping:
    """Which heads share keys and values; NoSite where those do not come from this layer."""
    _, key, value = _operands(attention)
    heads, key_heads = (int(node.meta["val"].shape[1]) for node in (attention, key))
    inside = set(layer.nodes)
    read: list[list[list[int]]] = []
    for operand in (key, value):
        labels = layer.labels(operand)
        if not labels or any(label.source not in inside for label in labels):
            raise NoSite("its keys and values do not come from this layer's projections")
        read += [_per_head(label, key_heads) for label in labels]
    seen: dict[object, int] = {}
    of_key = [
        seen.setdefault(tuple(tuple(features[head]) for features in read), len(seen))
        for head in range(key_heads)
    ]
    of_head = [of_key[head * key_heads // heads] for head in range(heads)]
    return _Grouping(of_key, of_head, len(seen))


def _find_heads(layer: TracedLayer, attention: fx.Node, grouping: _Grouping, found: Found) -> None:
    """The site of an attention's heads; NoSite where they cannot be told apart in the weights."""
    linears = layer.flow.linears
    assignment = Assignment(layer, grouping.lanes)
    _assign_operands(layer, attention, grouping, assignment)
    sink = layer.sink(attention)
    if sink is None or sink not in linears:
        raise NoSite("its output does not go to one projection")
    lane_of_head = torch.tensor(grouping.of_head, dtype=torch.int32)
    columns = _assign_output(layer, attention, sink, lane_of_head, assignment)
    ends = [n for n in (*_operands(attention), sink.args[0]) if isinstance(n, fx.Node)]
    sources = {attention} | {label.source for end in ends for label in layer.labels(end)}
    if not all(layer.comes_from(end, sources) for end in ends):
        raise NoSite("it is computed with more than this layer's projections")
    bindings = assignment.bindings()
    if bindings is None:
        raise NoSite("the layout of a projection does not follow the heads")
    every = range(grouping.lanes)
    layout = affine_blocks([torch.nonzero(columns == n).flatten().tolist() for n in every])
    if layout is None:
        raise NoSite("the layout of the output projection does not follow the heads")
    assignment.add_heads(attention, lane_of_head)
    if not assignment.is_separable():
        raise NoSite("a norm spans several heads")
    if len({grouping.of_head.count(lane) for lane in range(grouping.lanes)}) > 1:
        raise NoSite("its heads share keys unevenly")
    bindings.append(Binding(linears[sink], "in", layout))
    path = layer.flow.module(attention)[1] or layer.path
    lanes = grouping.lanes
    found.sites.append(Site("heads", "heads", 0, path, lanes, lanes, tuple(bindings)))
    found.narrowed |= {
        **assignment.narrowed("heads"),
        attention: (("heads", "heads"), ("kv_heads", "heads"), ("shape.1", "heads")),
        sink: (("in", "heads"),),
    }


def _assign_operands(
    layer: TracedLayer, attention: fx.Node, grouping: _Grouping, assignment: Assignment
) -> None:
    """Rows of the projections that make queries, keys and values."""
    heads = int(attention.meta["val"].shape[1])
    query, key, value = _operands(attention)
    key_heads = int(key.meta["val"].shape[1])
    for operand, count in ((query, heads), (key, key_heads), (value, key_heads)):
        owner = grouping.of_head if count == heads else grouping.of_key
        for label in layer.labels(operand):
            if label.source not in layer.flow.linears:
                raise NoSite("a projection is not a plain linear")
            features: list[set[int]] = [set() for _ in range(grouping.lanes)]
            for head, numbers in enumerate(_per_head(label, count)):
                features[owner[head]].update(numbers)
            assignment.add(label.source, [sorted(lane) for lane in features])


def _assign_output(
    layer: TracedLayer,
    attention: fx.Node,
    sink: fx.Node,
    lane_of_head: Tensor,
    assignment: Assignment,
) -> Tensor:
    """Rows of the projections that gate the output; the lane of each column of the last one."""
    arriving = layer.labels(sink.args[0])
    own = [label for label in arriving if label.source is attention]
    heads = layer.columns(own[0])
    if len(own) != 1 or bool((heads < 0).any()):
        raise NoSite("its output is mixed before the projection")
    columns = lane_of_head[heads.long()]
    for label in arriving:
        if label.source is attention:
            continue
        if label.source not in layer.flow.linears:
            raise NoSite("its output is mixed before the projection")
        gates = layer.columns(label)
        lanes = range(assignment.count)
        features = [sorted(set(gates[columns == lane].tolist())) for lane in lanes]
        assignment.add(label.source, features)
    return columns


def _add_neurons(layer: TracedLayer, found: Found) -> None:
    """The MLP: the widest pair of linears with a non-linearity in between."""
    linears = layer.flow.linears
    sink = _last_linear(layer)
    if sink is None:
        return
    hidden = sink.args[0]
    assert isinstance(hidden, fx.Node)
    width = int(hidden.meta["val"].shape[-1])
    assignment = Assignment(layer, width)
    for label in layer.labels(hidden):
        if layer.sink(label.source) is not sink or label.source not in layer.nodes:
            raise NoSite("its neurons are read elsewhere too")
        assignment.add(label.source, [[n] for n in layer.columns(label).long().tolist()])
    if not layer.comes_from(hidden, set(assignment.sources)):
        raise NoSite("its neurons meet values that are none of its own")
    bindings = assignment.bindings()
    if bindings is None or not assignment.is_separable():
        raise NoSite("its neurons cannot be told apart")
    bindings.append(Binding(linears[sink], "in", (Block(0, 1, 1),)))
    path = linears[sink].rpartition(".")[0]
    found.sites.append(Site("mlp", "mlp", 0, path, width, 1, tuple(bindings)))
    found.narrowed |= {**assignment.narrowed("mlp"), sink: (("in", "mlp"),)}


def _last_linear(layer: TracedLayer) -> fx.Node | None:
    """The linear with the widest input that comes from linears through a non-linearity."""
    best: tuple[int, fx.Node] | None = None
    for node in layer.nodes:
        arriving = layer.labels(node.args[0]) if node in layer.flow.linears else ()
        plain = all(label.source in layer.flow.linears for label in arriving)
        if arriving and plain and any(label.activated for label in arriving):
            width = int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
            if best is None or width > best[0]:
                best = (width, node)
    return best[1] if best else None

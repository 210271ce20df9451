"""Sites of one captured layer: which heads and neurons, and whether the layer can be left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, fx

from planner.ir.aten import ATTENTION, HEAVY, VIEWS, opname
from planner.ir.graph import Binding, Block, Site
from planner.ir.lanes import Label, LaneTracer, affine_blocks

__all__ = ["Found", "LayerRegion", "find_sites"]


@dataclass(frozen=True)
class LayerRegion:
    """One traced layer: the marks at its beginning and end."""

    path: str
    begin: fx.Node
    end: fx.Node


@dataclass
class Found:
    """Sites of a layer (named by kind only), what they narrow, and why others are none.

    `narrowed` maps a node to pairs (attribute or ``shape.i``, site kind); `kv_lanes` an attention
    node to its number of KV heads.
    """

    sites: list[Site] = field(default_factory=list)
    narrowed: dict[fx.Node, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    kv_lanes: dict[fx.Node, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


class _Lanes:
    """Lane number of every feature of every source, filled role by role."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.roles: list[tuple[fx.Node, list[list[int]]]] = []
        self._tables: dict[fx.Node, Tensor | None] = {}

    def add(self, source: fx.Node, features: list[list[int]]) -> None:
        """Features of each lane in one role (q, k, v, gate, ...) of a source."""
        if all(lane == features[0] for lane in features) and self.count > 1:
            return  # shared by all lanes: not narrowed
        if not any(s is source and f == features for s, f in self.roles):
            self.roles.append((source, features))

    def sources(self) -> list[fx.Node]:
        return list(dict.fromkeys(source for source, _ in self.roles))

    def lane_of(self, source: fx.Node) -> Tensor | None:
        """Lane of each feature of a source; None unless each belongs to exactly one."""
        if source not in self._tables:
            self._tables[source] = self._lane_of(source)
        return self._tables[source]

    def _lane_of(self, source: fx.Node) -> Tensor | None:
        lane_of = np.full(int(source.meta["val"].shape[-1]), -1, dtype=np.int32)
        for owner, features in self.roles:
            if owner is source:
                numbers = np.concatenate([np.asarray(lane, dtype=np.int64) for lane in features])
                lanes = np.repeat(np.arange(self.count), [len(lane) for lane in features])
                known = lane_of[numbers]
                lane_of[numbers] = lanes
                if ((known != -1) & (known != lanes)).any() or (lane_of[numbers] != lanes).any():
                    return None
        return None if (lane_of == -1).any() else torch.from_numpy(lane_of)

    def blocks(self, source: fx.Node) -> tuple[Block, ...] | None:
        """Layout of a source's features, role by role, overlapping roles merged."""
        merged: list[set[int]] = [set() for _ in range(self.count)]
        blocks: list[Block] = []
        for owner, features in self.roles:
            if owner is not source:
                continue
            fresh = [sorted(set(lane) - merged[i]) for i, lane in enumerate(features)]
            if not any(fresh):
                continue
            found = affine_blocks(fresh)
            if found is None:
                return None
            blocks.extend(found)
            for i, lane in enumerate(fresh):
                merged[i].update(lane)
        return tuple(blocks)


def _features(index: Tensor, axis: int, count: int) -> list[list[int]]:
    """Distinct non-negative numbers at each position of one axis."""
    moved = index.movedim(axis, 0).reshape(count, -1)
    return [sorted(set(row[row >= 0].tolist())) for row in moved.unbind(0)]


def _one_token(index: Tensor, tokens_axis: int) -> Tensor:
    return index.select(tokens_axis, 0)


def find_sites(
    region: LayerRegion,
    tracer: LaneTracer,
    live: Set[fx.Node],
    weights: Mapping[fx.Node, str],
    module_of: Callable[[fx.Node], tuple[str, str]],
    tokens: int,
) -> Found:
    """Find what can be narrowed in one traced layer.

    Args:
        region: the layer.
        tracer: labels of all values.
        live: nodes that activations flow through.
        weights: linear node -> module path.
        module_of: node -> (key, path) of its innermost module.
        tokens: the token count that the layer was captured with.
    """
    found = Found()
    nodes = _inside(region, live)
    inside = set(nodes)
    if _residual(region, inside):
        found.sites.append(Site("layer", "layer", 0, region.path))
    else:
        found.reasons.append(f"{region.path}: no residual path from its input to its output")
    # Attention among the states of one token has the tokens where heads stand.
    attentions = [
        n for n in nodes if opname(n) in ATTENTION and int(n.meta["val"].shape[1]) % tokens
    ]
    if len(attentions) == 1:
        _heads(region, attentions[0], nodes, live, tracer, weights, module_of, tokens, found)
    elif attentions:
        found.reasons.append(f"{region.path}: {len(attentions)} attention operators in one layer")
    _mlp(nodes, live, tracer, weights, tokens, found)
    found.sites.sort(key=lambda s: ("layer", "heads", "mlp").index(s.kind))
    return found


def _inside(region: LayerRegion, live: Set[fx.Node]) -> list[fx.Node]:
    nodes, active = [], False
    for node in region.begin.graph.nodes:
        if node is region.begin:
            active = True
        elif node is region.end:
            break
        elif active and node in live and node.op == "call_function":
            nodes.append(node)
    return nodes


def _residual(region: LayerRegion, inside: set[fx.Node]) -> bool:
    """Whether additions alone lead from the layer's input to its output.

    Scaling by a constant or a parameter on the way is allowed: leaving the layer out leaves it out.
    """
    pending, seen = [region.end.args[0]], set()
    while pending:
        node = pending.pop()
        if node is region.begin:
            return True
        if not isinstance(node, fx.Node) or node in seen or node not in inside:
            continue
        seen.add(node)
        name = opname(node)
        if name in ("add", "add_"):
            pending.extend(node.all_input_nodes)
        elif name in VIEWS:
            pending.append(node.args[0])
        elif name in ("mul", "mul_") and sum(a in inside for a in node.all_input_nodes) == 1:
            pending.extend(a for a in node.all_input_nodes if a in inside)
    return False


def _sink(nodes: list[fx.Node], source: fx.Node, tracer: LaneTracer) -> fx.Node | None:
    """The one linear that a source's elements arrive at, None unless there is exactly one."""
    sinks = [
        node
        for node in nodes
        if opname(node) == "linear" and any(a.source is source for a in tracer.of(node.args[0]))
    ]
    return sinks[0] if len(sinks) == 1 else None


def _heads(
    region: LayerRegion,
    attention: fx.Node,
    nodes: list[fx.Node],
    live: Set[fx.Node],
    tracer: LaneTracer,
    weights: Mapping[fx.Node, str],
    module_of: Callable[[fx.Node], tuple[str, str]],
    tokens: int,
    found: Found,
) -> None:
    """Attention heads, in units of KV groups."""
    path = module_of(attention)[1] or region.path

    def refuse(why: str) -> None:
        found.reasons.append(f"{path}: {why}")

    query, key, value = attention.args[:3]
    heads = int(attention.meta["val"].shape[1])
    key_heads = int(key.meta["val"].shape[1])  # type: ignore[union-attr]
    keyed: list[tuple[tuple[int, ...], ...]] = []
    for operand in (key, value):
        labels = tracer.of(operand)
        if not labels or any(label.source not in nodes for label in labels):
            return refuse("its keys and values do not come from this layer's projections")
        for label in labels:
            features = _features(_one_token(label.index, 2), 1, key_heads)
            keyed.append(tuple(map(tuple, features)))
    # Heads that read the same keys and values form one group.
    group_of_key: list[int] = []
    seen: dict[object, int] = {}
    for head in range(key_heads):
        group_of_key.append(seen.setdefault(tuple(k[head] for k in keyed), len(seen)))
    lanes = len(seen)
    group = [group_of_key[head * key_heads // heads] for head in range(heads)]
    found.kv_lanes[attention] = lanes
    members = [[h for h in range(heads) if group[h] == lane] for lane in range(lanes)]
    assignment = _Lanes(lanes)
    for operand, count in ((query, heads), (key, key_heads), (value, key_heads)):
        for label in tracer.of(operand):
            if label.source not in weights:
                return refuse("a projection is not a plain linear")
            per_head = _features(_one_token(label.index, 2), 1, count)
            owner = group if count == heads else group_of_key
            merged: list[list[int]] = [[] for _ in range(lanes)]
            for head, numbers in enumerate(per_head):
                merged[owner[head]] = sorted({*merged[owner[head]], *numbers})
            assignment.add(label.source, merged)
    sink = _sink(nodes, attention, tracer)
    if sink is None or sink not in weights:
        return refuse("its output does not go to one projection")
    arriving = tracer.of(sink.args[0])
    own = [a for a in arriving if a.source is attention]
    column_head = _one_token(own[0].index, own[0].index.ndim - 2).reshape(-1)
    if len(own) != 1 or bool((column_head < 0).any()):
        return refuse("its output is mixed before the projection")
    lane_of_head = torch.tensor(group, dtype=torch.int32)
    columns = lane_of_head[column_head.long()]
    for label in arriving:
        if label.source is attention:
            continue
        if label.source not in weights:
            return refuse("its output is mixed before the projection")
        gates = _one_token(label.index, label.index.ndim - 2).reshape(-1)
        assignment.add(
            label.source,
            [sorted(set(gates[columns == lane].tolist())) for lane in range(lanes)],
        )
    ends = [end for end in (*attention.args[:3], sink.args[0]) if isinstance(end, fx.Node)]
    sources = {attention} | {label.source for end in ends for label in tracer.of(end)}
    if not all(_closed(end, sources, live) for end in ends):
        return refuse("it is computed with more than this layer's projections")
    bindings = _bindings(assignment, weights)
    if bindings is None:
        return refuse("the layout of a projection does not follow the heads")
    column_lanes = [torch.nonzero(columns == lane).reshape(-1).tolist() for lane in range(lanes)]
    layout = affine_blocks(column_lanes)
    if layout is None:
        return refuse("the layout of the output projection does not follow the heads")
    extra = {attention: lane_of_head}
    if not _separable(assignment, tracer, extra, tokens):
        return refuse("a norm spans several heads")
    if len(members[0]) * lanes != heads:
        return refuse("its heads share keys unevenly")
    bindings.append(Binding(weights[sink], "in", layout))
    found.sites.append(Site("heads", "heads", 0, path, lanes, lanes, tuple(bindings)))
    _narrow(nodes, assignment, tracer, extra, "heads", tokens, found)
    found.narrowed[attention] = (("heads", "heads"), ("kv_heads", "heads"), ("shape.1", "heads"))
    found.narrowed[sink] = (("in", "heads"),)


def _mlp(
    nodes: list[fx.Node],
    live: Set[fx.Node],
    tracer: LaneTracer,
    weights: Mapping[fx.Node, str],
    tokens: int,
    found: Found,
) -> None:
    """The widest pair of linears with a non-linearity in between."""
    best: tuple[int, fx.Node] | None = None
    for node in nodes:
        if node not in weights:
            continue
        arriving = tracer.of(node.args[0])
        plain = all(label.source in weights for label in arriving)
        if arriving and plain and any(label.activated for label in arriving):
            width = int(node.args[0].meta["val"].shape[-1])  # type: ignore[union-attr]
            if best is None or width > best[0]:
                best = (width, node)
    if best is None:
        return
    width, sink = best
    assignment = _Lanes(width)
    for label in tracer.of(sink.args[0]):
        if _sink(nodes, label.source, tracer) is not sink or label.source not in nodes:
            found.reasons.append(f"{weights[sink]}: its neurons are read elsewhere too")
            return
        numbers = _one_token(label.index, label.index.ndim - 2).reshape(-1)
        assignment.add(label.source, [[int(n)] for n in numbers])
    if not _closed(sink.args[0], set(assignment.sources()), live):  # type: ignore[arg-type]
        found.reasons.append(f"{weights[sink]}: its neurons meet values that are none of its own")
        return
    bindings = _bindings(assignment, weights)
    if bindings is None or not _separable(assignment, tracer, {}, tokens):
        found.reasons.append(f"{weights[sink]}: its neurons cannot be told apart")
        return
    bindings.append(Binding(weights[sink], "in", (Block(0, 1, 1),)))
    path = weights[sink].rpartition(".")[0]
    found.sites.append(Site("mlp", "mlp", 0, path, width, 1, tuple(bindings)))
    _narrow(nodes, assignment, tracer, {}, "mlp", tokens, found)
    found.narrowed[sink] = (("in", "mlp"),)


def _bindings(assignment: _Lanes, weights: Mapping[fx.Node, str]) -> list[Binding] | None:
    """One binding per module; a module that runs twice must have one layout."""
    bindings: dict[str, Binding] = {}
    for source in assignment.sources():
        blocks = assignment.blocks(source)
        if blocks is None or assignment.lane_of(source) is None:
            return None
        binding = Binding(weights[source], "out", blocks)
        if bindings.setdefault(binding.module, binding) != binding:
            return None
    return list(bindings.values())


def _closed(end: fx.Node, sources: set[fx.Node], live: Set[fx.Node]) -> bool:
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
        pending.extend(n for n in node.all_input_nodes if n in live)
    return True


def _lane_index(label: Label, lane_of: Tensor, tokens: int) -> Tensor:
    """Lane of each element of a value for one token, -1 where the label does not reach."""
    index = label.index.real.int() if label.index.is_complex() else label.index
    for axis, size in enumerate(index.shape):
        if size == tokens:
            index = index.narrow(axis, 0, 1)
    lanes = lane_of[index.clamp(min=0).long()]
    return torch.where(index < 0, -1, lanes)


def _tables(assignment: _Lanes, extra: Mapping[fx.Node, Tensor]) -> dict[fx.Node, Tensor]:
    tables: dict[fx.Node, Tensor] = dict(extra)
    for source in assignment.sources():
        table = assignment.lane_of(source)
        if table is not None:
            tables[source] = table
    return tables


def _separable(
    assignment: _Lanes,
    tracer: LaneTracer,
    extra: Mapping[fx.Node, Tensor],
    tokens: int,
) -> bool:
    """Whether no reduction (a norm, say) mixes elements of different lanes."""
    tables = _tables(assignment, extra)
    for label, axes in tracer.mixed:
        if label.source not in tables:
            continue
        lanes = _lane_index(label, tables[label.source], tokens)
        if bool((lanes.amin(dim=axes) != lanes.amax(dim=axes)).any()):
            return False
    return True


def _narrow(
    nodes: list[fx.Node],
    assignment: _Lanes,
    tracer: LaneTracer,
    extra: Mapping[fx.Node, Tensor],
    kind: str,
    tokens: int,
    found: Found,
) -> None:
    """Note which operators shrink with the site, and along which dimension."""
    tables = _tables(assignment, extra)
    for node in nodes:
        labels = [label for label in tracer.of(node) if label.source in tables]
        value = node.meta.get("val")
        if not labels or not isinstance(value, Tensor) or isinstance(labels[0].index, tuple):
            continue
        lanes = _lane_index(labels[0], tables[labels[0].source], tokens)
        for label in labels[1:]:
            # Joined values come from several sources, each from one of them.
            lanes = torch.maximum(lanes, _lane_index(label, tables[label.source], tokens))
        axes = [axis for axis in range(lanes.ndim) if _varies(lanes, axis)]
        if len(axes) != 1:
            continue
        # The samples' dimension is always first in the Graph, whether or not the node has one.
        dimension = axes[0] if value.shape[0] == 1 else axes[0] + 1
        pairs = [(f"shape.{dimension}", kind)]
        if opname(node) == "linear" and node in tables:
            pairs.append(("out", kind))
        found.narrowed[node] = tuple(pairs)


def _varies(lanes: Tensor, axis: int) -> bool:
    """Whether lanes differ along an axis; elements of no lane (-1) are the same for all."""
    if lanes.shape[axis] < 2 or not lanes.numel():
        return False
    highest = lanes.amax(axis)
    lowest = torch.where(lanes < 0, highest.unsqueeze(axis), lanes).amin(axis)
    return bool((highest != lowest).any())

"""Sites of one captured layer: the layer itself, its heads, its neurons."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from planner.ir.graph import Binding, Block, Site
from planner.ir.lowering.assignment import Assignment
from planner.ir.lowering.aten import ATTENTION, opname
from planner.ir.lowering.head_lanes import find_heads, group_heads
from planner.ir.lowering.lanes import NoSite, TracedLayer


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
    found = Found([Site("layer", "layer", 0, layer.path)])
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
    if len(attentions) > 1:
        found.reasons.append(f"{layer.path}: {len(attentions)} attention operators in one layer")
    if len(attentions) != 1:
        return
    (attention,) = attentions
    try:
        grouping = group_heads(layer, attention)
        found.kv_lanes[attention] = grouping.lanes
        site, narrowed = find_heads(layer, attention, grouping)
    except NoSite as why:
        path = layer.flow.module(attention)[1] or layer.path
        found.reasons.append(f"{path}: {why}")
    else:
        found.sites.append(site)
        found.narrowed |= narrowed


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
        assignment.add(label.source, [[int(n)] for n in layer.columns(label)])
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

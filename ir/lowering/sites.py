"""Sites of one captured layer: the layer itself, its heads, its neurons."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import fx

from planner.ir.graph import Site
from planner.ir.lowering.aten import ATTENTION, opname
from planner.ir.lowering.head_lanes import find_heads, group_heads
from planner.ir.lowering.neuron_lanes import find_neurons
from planner.ir.lowering.traced_layer import NoSite, TracedLayer


@dataclass
class Found:
    """What can be narrowed in one traced layer.

    Attributes:
        sites: named by their kind only.
        narrowed: node -> pairs (attribute or ``shape.i``, kind of the site that narrows it).
        kv_lanes: attention node -> its number of KV heads.
        reasons: why a block cannot be narrowed, one sentence each.
    """

    sites: list[Site] = field(default_factory=list)
    narrowed: dict[fx.Node, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    kv_lanes: dict[fx.Node, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)


def find_sites(layer: TracedLayer) -> Found:
    """Find what can be narrowed in one traced layer.

    Whether the layer can be left out is seen in the whole Graph (`planner.ir.lowering.sharing`).
    """
    found = Found([Site("layer", "layer", 0, layer.path)])
    _add_heads(layer, found)
    _add_neurons(layer, found)
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
    try:
        neurons = find_neurons(layer)
    except NoSite as why:
        found.reasons.append(f"{layer.path}: {why}")
    else:
        if neurons is not None:
            site, narrowed = neurons
            found.sites.append(site)
            found.narrowed |= narrowed

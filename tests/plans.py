"""Random plans of a Graph, for hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from planner.ir.graph import Graph
from planner.plan import Plan, TokenStage

__all__ = ["MLP_SWITCHES", "dense_plan", "plan_of", "plans"]

# No divisor of the tiny models' 96 neurons: switches of 14 and of 13.
MLP_SWITCHES = 7


def plan_of(graph: Graph, **switches: object) -> Plan:
    """A plan of this graph with the given switches."""
    mlp = switches.get("mlp", {})
    switches.setdefault("mlp_switches", dict.fromkeys(mlp, MLP_SWITCHES))
    return Plan(graph.name, str(graph.properties["fingerprint"]), graph.layers, **switches)


def dense_plan(graph: Graph) -> Plan:
    """Everything on."""
    return plan_of(graph)


@st.composite
def plans(draw: st.DrawFn, graph: Graph, image_tokens: int = 0, images: int = 1) -> Plan:
    """Any layers off, any heads and MLP groups kept, none and all of them included.

    With `image_tokens` (of one image) up to two token stages as well.
    """
    layers = range(graph.layers)

    def some_of(count: int) -> st.SearchStrategy[tuple[int, ...]]:
        return st.sets(st.integers(0, count - 1), max_size=count).map(lambda s: tuple(sorted(s)))

    off = tuple(layer for layer in layers if draw(st.integers(0, 3)) == 0)
    on = [layer for layer in layers if layer not in off]
    heads = {
        layer: draw(some_of(graph.sites_by_name[f"heads.{layer}"].switches))
        for layer in on
        if draw(st.booleans())
    }
    mlp = {layer: draw(some_of(MLP_SWITCHES)) for layer in on if draw(st.booleans())}
    stages = []
    left = of = image_tokens * images
    if image_tokens:
        for layer in sorted(draw(st.sets(st.sampled_from(layers), max_size=2))):
            keep = draw(st.integers(0, left))
            stages.append(TokenStage(layer, keep, of))
            left = keep
    return plan_of(
        graph,
        layers_off=off,
        heads=heads,
        mlp=mlp,
        tokens=tuple(stages),
    )

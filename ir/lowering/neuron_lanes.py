"""Neurons: the widest pair of linears of a layer with a non-linearity in between, its MLP."""

from __future__ import annotations

from torch import fx

from planner.ir.graph import Binding, Block, Site
from planner.ir.lowering.assignment import Assignment
from planner.ir.lowering.traced_layer import NoSite, TracedLayer


def find_neurons(
    layer: TracedLayer,
) -> tuple[Site, dict[fx.Node, tuple[tuple[str, str], ...]]] | None:
    """The site of an MLP's neurons, and what it narrows; None where there is no MLP.

    Raises:
        NoSite: where neurons cannot be told apart in the weights.
    """
    linears = layer.flow.linears
    sink = _last_linear(layer)
    if sink is None:
        return None
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
    narrowed = assignment.narrowed("mlp")
    narrowed[sink] = (("in", "mlp"),)
    return Site("mlp", "mlp", 0, path, width, 1, tuple(bindings)), narrowed


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

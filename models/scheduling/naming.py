"""From what users write to a layout."""

from __future__ import annotations

from collections.abc import Mapping

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.scheduling.cost_layout import CostSwitches
from planner.models.scheduling.layouts import LayerSwitches, Layout, UnitSwitches
from planner.planning.switches import AXES

#: Layouts that count as the paper does; all others budget in cost.
COUNTED: Mapping[str, type[Layout]] = {"adallava-l": LayerSwitches, "adallava-h": UnitSwitches}


def layout_of(name: str, graph: Graph) -> Layout:
    """The layout that users call `name`, such as ``adallava-l`` or ``layers,heads,mlp``.

    Raises:
        InputError: there is none, or the model cannot have it.
    """
    if name in COUNTED:
        layout = COUNTED[name](graph)
    elif set(name.partition(":")[0].split(",")) <= {*AXES, "all"}:
        layout = CostSwitches.parse(name, graph)
    else:
        raise InputError(
            f"unknown switches '{name}' of a scheduler: choose from {', '.join(COUNTED)}, or some "
            f"of {', '.join(AXES[1:])} with :groups=16 or alike"
        )
    _ = layout.size
    return layout

"""Sharing: blocks that cannot be narrowed because other layers read what lies inside them.

Some models let later layers attend to an earlier layer's keys and values. That layer's heads belong
to all of its readers, and it cannot be left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from planner.ir.graph import Operator, Site

__all__ = ["without_shared"]


def without_shared(
    operators: Sequence[Operator], sites: Sequence[Site]
) -> tuple[list[Operator], list[Site], list[str]]:
    """Drop the sites that something outside them depends on.

    Returns:
        operators that are no longer narrowed by those sites, the sites that are left, and one
        sentence for each that is not.
    """
    shared = _narrowed_elsewhere(operators) | _read_inside(operators, sites)
    kept = [site for site in sites if site.name not in shared]
    reasons = [
        f"{site.module}: other layers read what it computes ({site.name})"
        for site in sites
        if site.name in shared
    ]
    if not shared:
        return list(operators), kept, reasons
    freed = [
        replace(o, narrowed_by=tuple(p for p in o.narrowed_by if p[1] not in shared))
        for o in operators
    ]
    return freed, kept, reasons


def _narrowed_elsewhere(operators: Sequence[Operator]) -> set[str]:
    """Sites with a narrowed output that is read where the site does not narrow."""
    narrows = {
        o.name: {site for what, site in o.narrowed_by if what.startswith("shape.")}
        for o in operators
    }
    return {
        site
        for reader in operators
        for source in reader.inputs
        for site in narrows.get(source, set()) - {site for _, site in reader.narrowed_by}
    }


def _read_inside(operators: Sequence[Operator], sites: Sequence[Site]) -> set[str]:
    """Layer sites with several operators that are read from outside."""
    layer_of = {site.module: site.name for site in sites if site.kind == "layer"}
    stacks = {module.rpartition(".")[0] for module in layer_of}
    home: dict[str, str] = {}
    for operator in operators:
        for stack in stacks:
            if operator.module.startswith(stack + "."):
                index = operator.module[len(stack) + 1 :].partition(".")[0]
                home[operator.name] = layer_of.get(f"{stack}.{index}", "")
    read: dict[str, set[str]] = {}
    for reader in operators:
        for source in reader.inputs:
            layer = home.get(source, "")
            if layer and home.get(reader.name, "") != layer:
                read.setdefault(layer, set()).add(source)
    return {layer for layer, sources in read.items() if len(sources) > 1}

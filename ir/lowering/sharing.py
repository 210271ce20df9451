"""Sharing: sites that are none because something outside them depends on what lies inside.

Some models let later layers attend to an earlier layer's keys and values. That layer's heads belong
to all of its readers, and it cannot be left out.
"""

from __future__ import annotations

from dataclasses import replace

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.structure import exit_of, residual_entry, within

__all__ = ["without_shared"]


def without_shared(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph without such sites, and one sentence for each kind of site."""
    reasons = _narrowed_elsewhere(graph) | _not_left_out(graph)
    if not reasons:
        return graph, []
    operators = (
        replace(o, narrowed_by=tuple(p for p in o.narrowed_by if p[1] not in reasons))
        for o in graph
    )
    sites = (site for site in graph.sites if site.name not in reasons)
    return graph.replacing(operators, sites), _summary(reasons)


def _summary(reasons: dict[str, str]) -> list[str]:
    """The first reason of each kind of site, and how many sites there are besides."""
    kinds: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault(name.partition(".")[0], []).append(reason)
    return [
        first + (f" (and {len(others)} layers more)" if others else "")
        for first, *others in kinds.values()
    ]


def _narrowed_elsewhere(graph: Graph) -> dict[str, str]:
    """Sites with a narrowed output that is read where the site does not narrow -> why."""
    narrows = {
        o.name: {site for what, site in o.narrowed_by if what.startswith("shape.")} for o in graph
    }
    reasons = {}
    for reader in graph:
        by = {site for _, site in reader.narrowed_by}
        for source in reader.inputs:
            for site in narrows[source] - by:
                reasons[site] = f"{site}: {reader.name} reads {source}, which it does not narrow"
    return reasons


def _not_left_out(graph: Graph) -> dict[str, str]:
    """Layers that cannot be left out -> why."""
    reasons = {}
    for site in graph.sites_of("layer"):
        inside = within(graph, site)
        try:
            residual_entry(graph, site, inside, exit_of(graph, site, inside))
        except InputError as error:
            reasons[site.name] = str(error)
    return reasons

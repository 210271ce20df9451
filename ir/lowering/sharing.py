"""Sharing: layers and heads that cannot be narrowed, because operators outside need them whole.

Some models let later layers attend to an earlier layer's keys and values. The heads of that layer
belong to all of its readers, and it cannot be left out.
"""

from __future__ import annotations

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.ir.structure import (
    exit_of,
    residual_entry,
    unnarrowed_readers,
    within,
    without_sites,
)


def without_shared(graph: Graph) -> tuple[Graph, list[str]]:
    """The graph without the sites that are shared, and one sentence for each kind of site."""
    reasons = {
        site: f"{site}: {reader} reads {source}, which it does not narrow"
        for reader, source, site in unnarrowed_readers(graph)
    } | _not_left_out(graph)
    if not reasons:
        return graph, []
    return without_sites(graph, reasons), _summary(reasons)


def _summary(reasons: dict[str, str]) -> list[str]:
    """The first reason of each kind of site, and how many sites there are besides."""
    kinds: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        kinds.setdefault(name.partition(".")[0], []).append(reason)
    return [
        first + (f" (and {len(others)} layers more)" if others else "")
        for first, *others in kinds.values()
    ]


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

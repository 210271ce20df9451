"""What lowering and passes ask of a Graph's structure, and the rewrites that passes share."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace

import networkx as nx

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator, Site, Value


def outputs(graph: Graph) -> tuple[str, ...]:
    """The operators that the model is run for: its head, or the last one of a model without."""
    head = tuple(operator.name for operator in graph if operator.part == "head")
    return head or tuple(operator.name for operator in graph.operators[-1:])


def tiles(graph: Graph) -> tuple[int, int]:
    """Of one image (the runs of its vision tower, patches of each that reach the projector).

    Several runs where images are cut into tiles; (1, 0) where there is no telling.
    """
    for operator in graph:
        if operator.part == "projector" and operator.kind == "linear" and len(operator.shape) > 2:
            first, *between, patches, _ = operator.shape
            runs = max(dict(first.terms).get("images", 1), 1)
            return runs * math.prod(dim.constant for dim in between), patches.constant
    return 1, 0


def needed(graph: Graph) -> set[str]:
    """Names of the operators that some output depends on."""
    names = set(outputs(graph))
    for name in outputs(graph):
        names |= nx.ancestors(graph.network, name)
    return names


def redirected(operators: Iterable[Operator], names: Mapping[str, str]) -> list[Operator]:
    """Operators that read ``names[x]`` where they read x."""
    return [
        replace(o, inputs=tuple(dict.fromkeys(names.get(i, i) for i in o.inputs)))
        if any(i in names for i in o.inputs)
        else o
        for o in operators
    ]


def takes_rows(linear: Operator, graph: Graph) -> bool:
    """Whether a linear takes the rows of its one input as they are, not a part of them."""
    rows = (*linear.shape[:-1], Dim(linear.integer("in")))
    return len(linear.inputs) == 1 and graph.by_name[linear.inputs[0]].shape == rows


def within(graph: Graph, site: Site) -> set[str]:
    """Names of the operators inside a site's module."""
    inside = site.module + "."
    return {o.name for o in graph if o.module == site.module or o.module.startswith(inside)}


def exit_of(graph: Graph, site: Site, inside: set[str]) -> str:
    """The one operator of a layer that others read; InputError where there are several, so that
    the layer cannot be left out."""
    network = graph.network
    read = sorted(name for name in inside if any(r not in inside for r in network[name]))
    if not read:
        read = [operator.name for operator in graph if operator.name in inside][-1:]
    if len(read) != 1:
        raise InputError(f"{site.name} cannot be left out: others read {', '.join(read)}")
    return read[0]


def residual_entry(graph: Graph, site: Site, inside: set[str], end: str) -> str:
    """The operator whose output the residual stream carries into a layer.

    It is found from the layer's end, backwards through sums and through scaling by a constant;
    InputError where no such path leads out of the layer.
    """
    known = graph.by_name
    pending, entries = [end], []
    while pending:
        operator = known[pending.pop()]
        scaling = operator.kind == "multiply" and len(operator.inputs) == 1
        if operator.kind == "add" or scaling:
            pending += [name for name in operator.inputs if name in inside]
            entries += [name for name in operator.inputs if name not in inside]
    fitting = {name for name in entries if known[name].shape == known[end].shape}
    if len(fitting) != 1:
        raise InputError(f"{site.name} cannot be left out: no residual path leads through it")
    return fitting.pop()


def residual_branches(graph: Graph, site: Site) -> tuple[str, ...]:
    """The modules whose outputs a layer adds to the stream that passes it: attention's, the MLP's.

    Empty where a layer does more to the stream than adding, adds what no module puts out, or where
    operators do not tell what it adds to.
    """
    inside, known = within(graph, site), graph.by_name
    try:
        end = exit_of(graph, site, inside)
        entry = residual_entry(graph, site, inside, end)
    except InputError:
        return ()
    sums, modules = [known[end]], []
    if sums[0].kind != "add":
        return ()
    for total in sums:
        for name in total.inputs:
            branch = known[name]
            if branch.kind == "add" and name in inside:
                sums.append(branch)
                continue
            while branch.kind == "multiply" and len(branch.inputs) == 1:
                branch = known[branch.inputs[0]]
            if branch.name != entry:
                modules.append(branch.module if branch.kind in ("linear", "norm") else "")
            elif name != entry:
                return ()  # the stream itself is scaled
    return () if "" in modules else tuple(dict.fromkeys(modules))


def narrowed(operator: Operator, kept: Mapping[str, tuple[int, int]]) -> Operator:
    """The operator with every quantity that a site narrows scaled by kept lanes / all lanes.

    `kept` gives both by the site's name; sites that are absent keep everything. ValueError where a
    quantity is no multiple of the site's lanes.
    """
    shape = list(operator.shape)
    attributes: dict[str, Value] = dict(operator.attributes)
    for quantity, site in operator.narrowed_by:
        if site not in kept:
            continue
        some, lanes = kept[site]
        if quantity.startswith("shape."):
            position = int(quantity[6:])
            shape[position] = Dim(_scaled(operator, shape[position].constant, some, lanes))
        else:
            attributes[quantity] = _scaled(operator, operator.integer(quantity), some, lanes)
    return replace(operator, shape=tuple(shape), attributes=tuple(sorted(attributes.items())))


def _scaled(operator: Operator, value: int, some: int, lanes: int) -> int:
    if value % lanes:
        raise ValueError(f"{operator.name}: {value} is not a multiple of {lanes} lanes")
    return value // lanes * some


def without_sites(graph: Graph, names: Collection[str]) -> Graph:
    """The graph without some sites, which nothing can narrow then."""
    if not names:
        return graph
    operators = (
        replace(o, narrowed_by=tuple(pair for pair in o.narrowed_by if pair[1] not in names))
        for o in graph
    )
    return graph.replacing(operators, (site for site in graph.sites if site.name not in names))


def unnarrowed_readers(graph: Graph) -> Iterator[tuple[str, str, str]]:
    """(reader, source, site) wherever a site narrows what is read, but not the reader."""
    sites = {o.name: {site for _, site in o.narrowed_by} for o in graph}
    outgoing = {
        o.name: {site for what, site in o.narrowed_by if what.startswith("shape.")} for o in graph
    }
    for reader in graph:
        for source in reader.inputs:
            for site in outgoing[source] - sites[reader.name]:
                yield reader.name, source, site

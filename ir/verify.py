"""The verifier: what every Graph must satisfy, as a table of rules.

It runs after lowering, after reading the text form and after every pass.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain

import networkx as nx

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import PARTS, SITE_KINDS, Binding, Graph, Operator, Site
from planner.ir.kinds import KINDS, kind_of
from planner.ir.structure import unnarrowed_readers

# What no model comes near; programs that count up to it would not come back.
_MOST = 1 << 40
_MOST_LANES = 1 << 24
_MOST_LAYERS = 10_000

# A rule yields one complaint, a whole sentence, for everything that breaks it.
Rule = Callable[[Graph], Iterator[str]]

PROPERTIES = ("decoder_layers", "dtype_bytes", "hidden_size", "image_tokens")
# Characters that the text form uses between names.
_RESERVED = frozenset(" \t\n,()[]{}%=:;")
_SYMBOL = re.compile(r"batch|images|encoding|encoded|(query|context)(\.\d+)?", re.ASCII)


def _names(graph: Graph) -> Iterator[str]:
    for what, records in (("operators", graph.operators), ("sites", graph.sites)):
        seen: set[str] = set()
        for record in records:
            if record.name in seen:
                yield f"two {what} have the name '{record.name}'"
            seen.add(record.name)
    for operator in graph:
        if not operator.name or _RESERVED & set(operator.name):
            yield f"'{operator.name}' cannot be an operator's name"


def _properties(graph: Graph) -> Iterator[str]:
    for key in PROPERTIES:
        value = graph.properties.get(key)
        if not isinstance(value, int) or value < 0:
            yield f"graph '{graph.name}' lacks the property {key}, a count (it is {value!r})"


def _kinds(graph: Graph) -> Iterator[str]:
    for operator in graph:
        if operator.kind not in KINDS:
            yield f"operator {operator.name} has unknown kind '{operator.kind}'"
        if operator.part not in PARTS:
            yield f"operator {operator.name} has unknown part '{operator.part}'"
    for site in graph.sites:
        if site.kind not in SITE_KINDS:
            yield f"site {site.name} has unknown kind '{site.kind}'"


def _inputs(graph: Graph) -> Iterator[str]:
    known = graph.by_name
    for operator in graph:
        for name in operator.inputs:
            if name not in known:
                yield f"operator {operator.name} reads {name}, which does not exist"


def _order(graph: Graph) -> Iterator[str]:
    network = graph.network
    if not nx.is_directed_acyclic_graph(network):
        first = nx.find_cycle(network)[0][0]
        yield f"operator {first} reads its own output, directly or through others"
    position = {operator.name: i for i, operator in enumerate(graph)}
    for source, reader in network.edges:
        if position[source] > position[reader]:
            yield f"operator {reader} stands before {source}, which it reads"


def _attributes(graph: Graph) -> Iterator[str]:
    for operator in graph:
        names = [name for name, _ in operator.attributes]
        if names != sorted(set(names)):
            yield f"operator {operator.name} has attributes out of order or twice"
        known = {attribute.name: attribute for attribute in kind_of(operator).attributes}
        for name in names:
            if name not in known:
                yield f"operator {operator.name} has the attribute {name}, {operator.kind} has not"
        for attribute in known.values():
            if fault := attribute.fault(operator):
                yield fault


def _sizes(graph: Graph) -> Iterator[str]:
    """No size is zero, and none is larger than any model's."""
    for key in PROPERTIES:
        most = _MOST_LAYERS if key == "decoder_layers" else _MOST
        if int(graph.properties[key]) > most:
            yield f"the property {key} of graph '{graph.name}' is too large"
    for operator in graph:
        if any(size.is_constant and not size.constant for size in operator.shape):
            yield f"operator {operator.name} has a size of 0"
        values = [value for _, value in operator.attributes if not isinstance(value, str)]
        sizes = [Dim.of(value) for value in (*operator.shape, *values)]
        if any(n > _MOST for size in sizes for n in (size.constant, *(c for _, c in size.terms))):
            yield f"operator {operator.name} has a size of more than {_MOST}"
    for site in graph.sites:
        blocks = [block for binding in site.bindings for block in binding.blocks]
        if any(max(b.offset, b.stride, b.width) > _MOST for b in blocks):
            yield f"site {site.name} binds features beyond {_MOST}"
        if site.lanes > _MOST_LANES:
            yield f"site {site.name} has more than {_MOST_LANES} lanes"


def _shapes(graph: Graph) -> Iterator[str]:
    for operator in graph:
        counts = (value for _, value in operator.attributes if isinstance(value, Dim))
        symbols = {symbol for size in (*operator.shape, *counts) for symbol in size.symbols}
        for symbol in sorted(symbols):
            if not _SYMBOL.fullmatch(symbol):
                yield f"operator {operator.name} has the unknown size {symbol}"
        if not operator.shape:
            yield f"operator {operator.name} has no shape"
        elif fault := kind_of(operator).shape_fault(operator):
            shape = ", ".join(map(str, operator.shape))
            yield f"operator {operator.name} with shape [{shape}] should have {fault}"


def _input_shapes(graph: Graph) -> Iterator[str]:
    for operator in graph:
        inputs = [graph.by_name[name] for name in operator.inputs]
        if fault := kind_of(operator).input_fault(operator, inputs):
            yield f"operator {operator.name} {fault}"


# -- sites ----------------------------------------------------------------------------------------


def _sites(graph: Graph) -> Iterator[str]:
    for site in graph.sites:
        if site.name != f"{site.kind}.{site.layer}":
            yield f"site {site.name} should be called {site.kind}.{site.layer}"
        if not 0 <= site.layer < graph.layers:
            yield f"site {site.name} lies in layer {site.layer} of {graph.layers}"
        if not 1 <= site.switches <= site.lanes:
            yield f"site {site.name} divides {site.lanes} lanes into {site.switches} switches"


def _layers(graph: Graph) -> Iterator[str]:
    stacks = {site.module.rpartition(".")[0] for site in graph.sites_of("layer")}
    for operator in graph:
        if operator.layer is None or operator.part != "decoder":
            continue
        inside = any(operator.module.startswith(stack + ".") for stack in stacks)
        if inside and not 0 <= operator.layer < graph.layers:
            yield f"operator {operator.name} lies in layer {operator.layer} of {graph.layers}"


def _narrowing(graph: Graph) -> Iterator[str]:
    for operator in graph:
        for quantity, name in operator.narrowed_by:
            site = graph.sites_by_name.get(name)
            if site is None:
                yield f"operator {operator.name} is narrowed by {name}, which does not exist"
                continue
            value = _quantity(operator, quantity)
            if value is None:
                yield f"operator {operator.name} has no count {quantity} that {name} could narrow"
            elif site.lanes < 1 or value % site.lanes:
                yield (
                    f"{quantity} of operator {operator.name} is {value}, "
                    f"no multiple of the {site.lanes} lanes of {name}"
                )


def _quantity(operator: Operator, quantity: str) -> int | None:
    """The number that a narrowing refers to."""
    value = operator.get(quantity)
    if quantity.startswith("shape."):
        position = quantity.removeprefix("shape.")
        if position.isascii() and position.isdecimal() and int(position) < len(operator.shape):
            value = operator.shape[int(position)]
    if isinstance(value, Dim) and value.is_constant:
        value = value.constant
    return value if isinstance(value, int) else None


def _linears(graph: Graph) -> Iterator[str]:
    """A linear's two sides agree with what is before and behind it."""
    for operator in graph:
        if operator.kind != "linear" or not operator.narrowed_by:
            continue
        own: dict[str, set[str]] = {}
        for what, site in operator.narrowed_by:
            own.setdefault(what, set()).add(site)
        last = f"shape.{len(operator.shape) - 1}"
        if own.get("out", set()) != own.get(last, set()):
            yield f"operator {operator.name} is narrowed in its outputs unlike in its shape"
        arriving = {
            site
            for name in operator.inputs
            for what, site in graph.by_name[name].narrowed_by
            if what.startswith("shape.")
        }
        if own.get("in", set()) != arriving:
            yield f"operator {operator.name} is narrowed in its inputs unlike what it reads"


def _flow(graph: Graph) -> Iterator[str]:
    """What reads a narrowed output is narrowed by the same site."""
    for reader, source, site in unnarrowed_readers(graph):
        yield f"operator {reader} reads {source}, but {site} does not narrow it"


def _bindings(graph: Graph) -> Iterator[str]:
    linears = {o.module: o for o in graph if o.kind == "linear"}
    for site in graph.sites:
        bound = [(binding.module, binding.axis) for binding in site.bindings]
        for module, axis in bound:
            if bound.count((module, axis)) > 1:
                yield f"site {site.name} binds {module}.{axis} twice"
        for binding in site.bindings:
            if binding.axis not in ("in", "out"):
                yield f"site {site.name} binds axis '{binding.axis}' of {binding.module}"
                continue
            linear = linears.get(binding.module)
            complaint = _layout(site, binding, linear.integer(binding.axis) if linear else None)
            if complaint:
                yield f"site {site.name} binds {binding.module}.{binding.axis}: {complaint}"


def _layout(site: Site, binding: Binding, features: int | None) -> str | None:
    """What is wrong with a binding: lanes that share features, or features of no lane."""
    spans: list[tuple[int, int]] = []
    for block in binding.blocks:
        if block.stride == block.width:
            spans.append((block.offset, block.width * site.lanes))
        else:
            starts = range(site.lanes)
            spans += [(block.offset + lane * block.stride, block.width) for lane in starts]
    spans.sort()
    end = 0
    for start, width in spans:
        if width < 1 or start < end:
            return f"feature {start} belongs to two lanes"
        if start > end and features is not None:
            return f"feature {end} belongs to no lane"
        end = start + width
    if features is not None and end != features:
        return f"the lanes cover {end} of {features} features"
    return None


# Earlier rules make later ones safe to evaluate: order matters.
RULES: dict[str, Rule] = {
    "names are unique": _names,
    "properties are there": _properties,
    "kinds and parts are known": _kinds,
    "inputs exist": _inputs,
    "inputs come first": _order,
    "attributes fit the kind": _attributes,
    "sizes are those of a model": _sizes,
    "shapes fit the attributes": _shapes,
    "shapes fit the inputs": _input_shapes,
    "sites are well formed": _sites,
    "layers exist": _layers,
    "narrowings refer to something": _narrowing,
    "narrowings flow to the readers": _flow,
    "linears are narrowed on both sides": _linears,
    "lanes are disjoint and cover": _bindings,
}


def verify(graph: Graph) -> None:
    """Check a Graph against every rule; InputError with the first complaint, which names the
    operator or site."""
    for complaint in chain.from_iterable(rule(graph) for rule in RULES.values()):
        raise InputError(f"the graph is broken: {complaint}")

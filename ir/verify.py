"""The verifier: what every Graph must satisfy, as a table of rules.

It runs after lowering, after reading the text form and after every pass, so a defect is reported
where it arises, with the name of the operator or site that is wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from types import MappingProxyType

import networkx as nx

from planner.ir.dims import Dim, product
from planner.ir.errors import InputError
from planner.ir.graph import KINDS, PARTS, SITE_KINDS, Binding, Graph, Operator, Site

__all__ = ["LINEAR_KINDS", "RULES", "verify"]

# A rule yields one complaint, a whole sentence, for everything that breaks it.
Rule = Callable[[Graph], Iterator[str]]

LINEAR_KINDS = frozenset(["linear", "fused_linear", "norm_linear"])
PROPERTIES = ("decoder_layers", "dtype_bytes", "hidden_size", "image_tokens")
# kind -> the attributes that its cost formulas read. All are counts; `keys` may be symbolic, and
# `_WORDS` are words.
ATTRIBUTES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "linear": ("bias", "in", "out"),
        "matmul": ("inner",),
        "conv": ("bias", "in", "kernel", "out"),
        "attention": ("head_dim", "heads", "keys", "kv_heads", "value_dim"),
        "norm": ("bias", "width"),
        "activation": ("function",),
        "elementwise": ("function",),
        "reduce": ("function",),
        "embedding": ("entries", "width"),
        "experts": ("experts", "in", "out"),
        "scan": ("flops_per_row",),
        "select_tokens": ("before", "keep", "of", "score_width"),
        "fused_linear": ("bias", "count", "in", "out"),
        "norm_linear": ("bias", "count", "in", "norm_bias", "out"),
    }
)
_WORDS = frozenset(["function"])
_TOKEN_COUNTS = frozenset(["before", "keys"])
_MAY_BE_ZERO = frozenset(["bias", "keep", "norm_bias", "score_width"])
# Characters that the text form uses between names.
_RESERVED = frozenset(" \t\n,()[]{}%=:;")
_SYMBOL = re.compile(r"batch|images|(query|context)(\.\d+)?", re.ASCII)
# Sizes to compare shapes at: primes, so that different expressions differ.
_SAMPLE = 1009


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
        for name in ATTRIBUTES.get(operator.kind, ()):
            value = operator.get(name)
            if value is None:
                yield f"operator {operator.name} ({operator.kind}) lacks the attribute {name}"
            elif name in _WORDS:
                if not isinstance(value, str):
                    yield f"attribute {name} of operator {operator.name} is {value}, not a word"
            elif isinstance(value, int):
                if value < (name not in _MAY_BE_ZERO):
                    yield f"attribute {name} of operator {operator.name} is {value}"
            elif name not in _TOKEN_COUNTS or not isinstance(value, Dim):
                yield f"attribute {name} of operator {operator.name} is {value}, not a count"


# -- shapes ---------------------------------------------------------------------------------------


def _width(attribute: str) -> Callable[[Operator], str | None]:
    """The last dimension is what an attribute says."""

    def check(operator: Operator) -> str | None:
        if operator.shape[-1] != Dim(operator.integer(attribute)):
            return f"{operator[attribute]} features ({attribute})"
        return None

    return check


def _attention(operator: Operator) -> str | None:
    heads, groups = operator.integer("heads"), operator.integer("kv_heads")
    if heads % groups:
        return f"heads in {groups} equal groups, not {heads} of them"
    places = operator.shape[-3:-2]
    if not places or (places[0].is_constant and places[0] != Dim(heads)):
        return f"{heads} heads before its tokens"
    return _width("value_dim")(operator)


def _tokens(operator: Operator) -> str | None:
    keep, of = operator.integer("keep"), operator.integer("of")
    return f"at most {of} tokens, not {keep}" if keep > of else None


# kind -> what its shape must have, or None where it has it.
SHAPES: Mapping[str, Callable[[Operator], str | None]] = MappingProxyType(
    {
        "linear": _width("out"),
        "fused_linear": _width("out"),
        "norm_linear": _width("out"),
        "experts": _width("out"),
        "embedding": _width("width"),
        "attention": _attention,
        "select_tokens": _tokens,
    }
)


def _shapes(graph: Graph) -> Iterator[str]:
    for operator in graph:
        counts = [operator[name] for name in _TOKEN_COUNTS if operator.get(name) is not None]
        sizes = (*operator.shape, *(count for count in counts if isinstance(count, Dim)))
        for symbol in sorted({symbol for size in sizes for symbol in size.symbols}):
            if not _SYMBOL.fullmatch(symbol):
                yield f"operator {operator.name} has the unknown size {symbol}"
        if not operator.shape:
            yield f"operator {operator.name} has no shape"
        elif operator.kind in SHAPES and (lack := SHAPES[operator.kind](operator)):
            shape = ", ".join(map(str, operator.shape))
            yield f"operator {operator.name} with shape [{shape}] should have {lack}"


def _elements(operator: Operator) -> int:
    symbols = {symbol for dim in operator.shape for symbol in dim.symbols}
    return product(operator.shape, dict.fromkeys(symbols, _SAMPLE))


def _features(graph: Graph) -> Iterator[str]:
    """A linear takes the features of its input: all, a part, or the same ones several times."""
    known = graph.by_name
    for operator in graph:
        if operator.kind in LINEAR_KINDS and len(operator.inputs) == 1:
            source = known[operator.inputs[0]]
            out, columns = operator.integer("out"), operator.integer("in")
            have, taken = _elements(source), _elements(operator) // out * columns
            if taken > have and taken % have:
                yield f"operator {operator.name} takes {columns} features, {source.name} has fewer"


def _broadcast(graph: Graph) -> Iterator[str]:
    """A smaller operand of equal rank in a sum or product broadcasts.

    Views are no operators, so an operand of the same size or larger may be arranged otherwise or
    read in part, and a smaller one may be arranged otherwise before it is broadcast.
    """
    known = graph.by_name
    for operator in graph:
        if operator.kind not in ("add", "multiply"):
            continue
        for source in (known[name] for name in operator.inputs):
            if len(source.shape) != len(operator.shape):
                continue
            *others, last = (
                have in (want, Dim(1))
                for have, want in zip(source.shape, operator.shape, strict=True)
            )
            have, want = _elements(source), _elements(operator)
            features_differ = all(others) and not last
            if have < want and (features_differ or (not all(others) and want % have)):
                yield f"operator {operator.name} cannot broadcast {source.name} to its shape"


# -- sites ----------------------------------------------------------------------------------------


def _sites(graph: Graph) -> Iterator[str]:
    for site in graph.sites:
        if site.name != f"{site.kind}.{site.layer}":
            yield f"site {site.name} should be called {site.kind}.{site.layer}"
        if not 0 <= site.layer < graph.layers:
            yield f"site {site.name} lies in layer {site.layer} of {graph.layers}"
        if site.switches < 1 or (site.kind != "tokens" and site.lanes < site.switches):
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


def _flow(graph: Graph) -> Iterator[str]:
    """What reads a narrowed output is narrowed by the same site."""
    sites = {o.name: {site for _, site in o.narrowed_by} for o in graph}
    outgoing = {
        o.name: {site for what, site in o.narrowed_by if what.startswith("shape.")} for o in graph
    }
    for operator in graph:
        for name in operator.inputs:
            for site in outgoing[name] - sites[operator.name]:
                yield f"operator {operator.name} reads {name}, but {site} does not narrow it"


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
RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "names are unique": _names,
        "properties are there": _properties,
        "kinds and parts are known": _kinds,
        "inputs exist": _inputs,
        "inputs come first": _order,
        "attributes fit the kind": _attributes,
        "shapes fit the attributes": _shapes,
        "linears have their features": _features,
        "sums broadcast": _broadcast,
        "sites are well formed": _sites,
        "layers exist": _layers,
        "narrowings refer to something": _narrowing,
        "narrowings flow to the readers": _flow,
        "lanes are disjoint and cover": _bindings,
    }
)


def verify(graph: Graph) -> None:
    """Check a Graph against every rule.

    Raises:
        InputError: with the first complaint, which names the operator or site.
    """
    for complaint in chain.from_iterable(rule(graph) for rule in RULES.values()):
        raise InputError(f"the graph is broken: {complaint}")

"""The text form of a Graph: one operator per line, read back exactly.

    graph llava-7b
    property decoder_layers 32
    site heads.0 heads layer=0 lanes=32 switches=32 module=... q_proj.out[0:128:128] ...
    %name = kind(%input, ...) [batch, query, 4096] {bias=0, in=4096} part decoder layer 0
        module ... narrow out:heads.0

Everything after ``;`` on a line is a comment (costs are printed there) and is not read back.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import KINDS, PARTS, SITE_KINDS, Binding, Block, Graph, Operator, Site

__all__ = ["fingerprint", "parse_graph", "print_graph"]

HEADER = "graph"
_OPERATOR = re.compile(
    r"%(?P<name>\S+) = (?P<kind>\w+)\((?P<inputs>[^)]*)\) \[(?P<shape>[^\]]*)\]"
    r"(?: \{(?P<attributes>[^}]*)\})?(?: in (?P<module>\S+))? @(?P<part>\w+)(?:\.(?P<layer>\d+))?"
    r"(?: narrow (?P<narrow>\S+))?"
)
_BLOCK = re.compile(r"(\d+):(\d+):(\d+)")


def _print_operator(operator: Operator) -> str:
    inputs = ", ".join(f"%{name}" for name in operator.inputs)
    shape = ", ".join(map(str, operator.shape))
    line = f"%{operator.name} = {operator.kind}({inputs}) [{shape}]"
    if operator.attributes:
        line += " {" + ", ".join(f"{k}={v}" for k, v in operator.attributes) + "}"
    if operator.module and operator.module != operator.name:
        line += f" in {operator.module}"
    elif operator.module:
        line += " in ="
    line += f" @{operator.part}" + (f".{operator.layer}" if operator.layer is not None else "")
    if operator.narrowed_by:
        line += " narrow " + ",".join(f"{what}:{site}" for what, site in operator.narrowed_by)
    return line


def _print_site(site: Site) -> str:
    line = (
        f"site {site.name} {site.kind} layer={site.layer} lanes={site.lanes} "
        f"switches={site.switches} module={site.module}"
    )
    for binding in site.bindings:
        blocks = ",".join(f"{b.offset}:{b.stride}:{b.width}" for b in binding.blocks)
        line += f" {binding.module}.{binding.axis}[{blocks}]"
    return line


def print_graph(graph: Graph, comment: Callable[[Operator], str] | None = None) -> str:
    """The text form; `comment` may add a remark (a cost, say) to each operator's line."""
    lines = [f"{HEADER} {graph.name}"]
    lines += [f"property {key} {value}" for key, value in sorted(graph.properties.items())]
    lines += [_print_site(site) for site in graph.sites]
    for operator in graph.operators:
        line = _print_operator(operator)
        remark = comment(operator) if comment else ""
        lines.append(f"{line}  ; {remark}" if remark else line)
    return "\n".join(lines) + "\n"


def fingerprint(graph: Graph) -> str:
    """Digest of a graph's structure: equal for equal operators and sites, whatever its name."""
    body = print_graph(Graph("", graph.operators, graph.sites))
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _value(text: str) -> int | str | Dim:
    if text.isdigit():
        return int(text)
    if "query" in text or "context" in text or "*" in text:
        return Dim.parse(text)
    return text


def _parse_operator(line: str, number: int) -> Operator:
    match = _OPERATOR.fullmatch(line)
    if match is None:
        raise InputError(f"line {number} of the graph is not an operator: '{line[:80]}'")
    name, kind, part = match["name"], match["kind"], match["part"]
    if kind not in KINDS:
        raise InputError(f"line {number} of the graph: operator {name} has unknown kind '{kind}'")
    if part not in PARTS:
        raise InputError(f"line {number} of the graph: operator {name} has unknown part '{part}'")
    attributes = []
    for item in filter(None, (match["attributes"] or "").split(", ")):
        key, _, text = item.partition("=")
        attributes.append((key, _value(text)))
    module = match["module"] or ""
    pairs = [item.partition(":") for item in (match["narrow"] or "").split(",") if item]
    try:
        shape = tuple(Dim.parse(d) for d in match["shape"].split(", ") if d)
    except ValueError as error:
        raise InputError(f"line {number} of the graph: operator {name}: {error}") from None
    return Operator(
        name=name,
        kind=kind,
        inputs=tuple(i.lstrip("%") for i in match["inputs"].split(", ") if i),
        shape=shape,
        module=name if module == "=" else module,
        part=part,
        layer=int(match["layer"]) if match["layer"] else None,
        attributes=tuple(attributes),
        narrowed_by=tuple((what, site) for what, _, site in pairs),
    )


def _parse_site(line: str, number: int) -> Site:
    try:
        _, name, kind, *rest = line.split(" ")
        settings = dict(item.split("=", 1) for item in rest[:4])
        bindings = []
        for item in rest[4:]:
            target, _, inside = item.rstrip("]").partition("[")
            module, _, axis = target.rpartition(".")
            blocks = tuple(Block(*map(int, m)) for m in _BLOCK.findall(inside))
            bindings.append(Binding(module, axis, blocks))
        if kind not in SITE_KINDS:
            raise ValueError(kind)
        return Site(
            name=name,
            kind=kind,
            layer=int(settings["layer"]),
            module=settings["module"],
            lanes=int(settings["lanes"]),
            switches=int(settings["switches"]),
            bindings=tuple(bindings),
        )
    except (ValueError, KeyError, TypeError):
        raise InputError(f"line {number} of the graph is not a site: '{line[:80]}'") from None


def parse_graph(text: str) -> Graph:
    """Read the text form back; raise InputError with the line number where it is broken."""
    name: str | None = None
    properties: dict[str, int | str] = {}
    sites: list[Site] = []
    operators: list[Operator] = []
    for number, full in enumerate(text.splitlines(), 1):
        line = full.partition("  ; ")[0].rstrip()
        if not line:
            continue
        word, _, rest = line.partition(" ")
        if name is None:
            if word != HEADER:
                raise InputError(f"line {number} of the graph should begin with '{HEADER}'")
            name = rest
        elif word == "property":
            key, _, value = rest.partition(" ")
            properties[key] = int(value) if value.isdigit() else value
        elif word == "site":
            sites.append(_parse_site(line, number))
        else:
            operators.append(_parse_operator(line, number))
    if name is None:
        raise InputError("the graph is empty")
    return Graph(name, tuple(operators), tuple(sites), properties)

"""The text form of a Graph: one operator per line, read back exactly.

    graph llava-7b
    property decoder_layers 32
    site heads.0 heads layer=0 lanes=32 switches=32 module=... q_proj.out[0:128:128] ...
    %name = kind(%input, ...) [batch, query, 4096] {bias=0, in=4096} part decoder layer 0
        module ... narrow out:heads.0
    end

Everything after ``;`` on a line is a comment (costs are printed there) and is not read back.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable

from planner.ir.dims import Dim
from planner.ir.errors import InputError
from planner.ir.graph import PARTS, SITE_KINDS, Binding, Block, Graph, Operator, Site, Value
from planner.ir.kinds import KINDS, Kind

HEADER = "graph"
# Tells a whole graph from one that was cut off.
END = "end"
_OPERATOR = re.compile(
    r"%(?P<name>\S+) = (?P<kind>\w+)\((?P<inputs>[^)]*)\) \[(?P<shape>[^\]]*)\]"
    r"(?: \{(?P<attributes>[^}]*)\})?(?: in (?P<module>\S+))? @(?P<part>\w+)(?:\.(?P<layer>\d+))?"
    r"(?: narrow (?P<narrow>\S+))?",
    re.ASCII,
)
_SITE = re.compile(
    r"site (?P<name>\S+) (?P<kind>\w+) layer=(?P<layer>\d+) lanes=(?P<lanes>\d+) "
    r"switches=(?P<switches>\d+) module=(?P<module>\S*)(?P<bindings>(?: \S+)*)",
    re.ASCII,
)
_BINDING = re.compile(r"(?P<module>\S+)\.(?P<axis>\w+)\[(?P<blocks>[\d:,]+)\]", re.ASCII)


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
    return "\n".join([*lines, END]) + "\n"


def fingerprint(graph: Graph) -> str:
    """Digest of a graph's structure: equal for equal operators and sites, whatever its name."""
    body = print_graph(Graph("", graph.operators, graph.sites)).removesuffix(f"{END}\n")
    return hashlib.sha256(body.encode()).hexdigest()[:16]


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _attribute(kind: Kind, item: str) -> tuple[str, Value]:
    name, equals, text = item.partition("=")
    if not equals:
        raise ValueError(f"'{item}' is not an attribute such as in=4096")
    for attribute in kind.attributes:
        if attribute.name == name:
            return name, attribute.read(text)
    raise ValueError(f"{kind.name} has no attribute '{name}'")


def _input(item: str) -> str:
    if not item.startswith("%"):
        raise ValueError(f"input '{item}' lacks its %")
    return item[1:]


def _parse_operator(line: str) -> Operator:
    match = _OPERATOR.fullmatch(line)
    if match is None:
        raise ValueError(f"'{line[:80]}' is not an operator")
    name, kind, part = match["name"], match["kind"], match["part"]
    if kind not in KINDS:
        raise ValueError(f"operator {name} has unknown kind '{kind}'")
    if part not in PARTS:
        raise ValueError(f"operator {name} has unknown part '{part}'")
    module = match["module"] or ""
    pairs = [item.partition(":") for item in _items(match["narrow"], ",")]
    try:
        return Operator(
            name=name,
            kind=kind,
            inputs=tuple(map(_input, _items(match["inputs"]))),
            shape=tuple(map(Dim.parse, _items(match["shape"]))),
            module=name if module == "=" else module,
            part=part,
            layer=int(match["layer"]) if match["layer"] else None,
            attributes=tuple(_attribute(KINDS[kind], i) for i in _items(match["attributes"])),
            narrowed_by=tuple((what, site) for what, _, site in pairs),
        )
    except ValueError as error:
        raise ValueError(f"operator {name}: {error}") from None


def _items(text: str | None, separator: str = ", ") -> list[str]:
    return text.split(separator) if text else []


def _parse_site(line: str) -> Site:
    match = _SITE.fullmatch(line)
    if match is None or match["kind"] not in SITE_KINDS:
        raise ValueError(f"'{line[:80]}' is not a site")
    return Site(
        name=match["name"],
        kind=match["kind"],
        layer=int(match["layer"]),
        module=match["module"],
        lanes=int(match["lanes"]),
        switches=int(match["switches"]),
        bindings=tuple(map(_parse_binding, match["bindings"].split())),
    )


def _parse_binding(text: str) -> Binding:
    match = _BINDING.fullmatch(text)
    blocks = [item.split(":") for item in match["blocks"].split(",")] if match else []
    if match is None or any(len(numbers) != 3 for numbers in blocks):
        raise ValueError(f"'{text}' is not a binding such as layers.0.q_proj.out[0:64:64]")
    return Binding(match["module"], match["axis"], tuple(Block(*map(int, n)) for n in blocks))


def _property(text: str) -> tuple[str, int | str]:
    key, _, value = text.partition(" ")
    # A digest may have no letter in it, and is no number for that.
    return key, int(value) if _is_number(value) and key != "fingerprint" else value


def parse_graph(text: str) -> Graph:
    """Read the text form back; raise InputError with the line number where it is broken.

    What the lines say together is for `planner.ir.verify.verify` to judge.
    """
    name: str | None = None
    properties: dict[str, int | str] = {}
    sites: list[Site] = []
    operators: list[Operator] = []
    ended = False
    for number, full in enumerate(text.splitlines(), 1):
        line = full.partition("  ; ")[0].rstrip()
        if not line:
            continue
        word, _, rest = line.partition(" ")
        try:
            if name is None:
                if word != HEADER:
                    raise ValueError(f"it should begin with '{HEADER}'")
                name = rest
            elif ended:
                raise ValueError(f"it goes on behind its '{END}'")
            elif line == END:
                ended = True
            elif word == "property":
                key, value = _property(rest)
                if key in properties:
                    raise ValueError(f"the property {key} is given twice")
                properties[key] = value
            elif word == "site":
                sites.append(_parse_site(line))
            else:
                operators.append(_parse_operator(line))
        except ValueError as error:
            raise InputError(f"line {number} of the graph: {error}") from None
    if name is None:
        raise InputError("the graph is empty")
    if not ended:
        raise InputError(f"the graph is cut off: its last line should be '{END}'")
    return Graph(name, tuple(operators), tuple(sites), properties)

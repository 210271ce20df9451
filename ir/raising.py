"""Raising: from the ATen nodes of a captured module to operators of the Graph.

Views and copies disappear; the nodes of a norm, of an activation, of a rotary embedding or of a
recurrence become one operator each; every product that FlopCounterMode counts is kept. Folded
layers are expanded by copying the operators of the layer they are like.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import SymInt, Tensor, fx

from planner.ir.aten import (
    ACTIVATIONS,
    ATTENTION,
    HEAVY,
    NORMS,
    REDUCTIONS,
    VIEWS,
    opname,
)
from planner.ir.capture import WRAPPED, Captured, Stack
from planner.ir.dims import Dim
from planner.ir.graph import Operator, Site
from planner.ir.lanes import LaneTracer
from planner.ir.sites import LayerRegion, find_sites

__all__ = ["Raised", "Surroundings", "raise_operators"]


@dataclass(frozen=True)
class Surroundings:
    """How one captured module sits in the model.

    Attributes:
        prefix: path of the module inside the model, with a trailing dot, or "".
        part: module path -> part of the Graph.
        samples: symbol of the leading dimension (``batch`` or ``images``).
        marker: the token count that the module was captured with; sizes that are multiples of it
            are token counts. 0 where every size is fixed.
        main_stack: path of the stack whose layers can be switched, None without one.
    """

    prefix: str
    part: Callable[[str], str]
    samples: str
    marker: int = 0
    main_stack: str | None = None


@dataclass(frozen=True)
class Raised:
    """Operators in order, the sites among them, why others are none, and the outputs' operators."""

    operators: list[Operator]
    sites: list[Site]
    reasons: list[str]
    outputs: tuple[str, ...]


@dataclass
class _Group:
    """Nodes that become one operator, emitted where the last of them stands."""

    kind: str
    nodes: list[fx.Node] = field(default_factory=list)
    suffix: str = ""


class _Raiser:
    def __init__(self, captured: Captured, around: Surroundings) -> None:
        self.captured, self.around = captured, around
        self.operators: list[Operator] = []
        self.names: dict[str, int] = {}
        self.source: dict[fx.Node, str] = {}
        self.group_of: dict[fx.Node, _Group] = {}
        self.live = self._live()
        self.regions: list[LayerRegion] = []
        self.emitted: dict[str, fx.Node] = {}

    # -- which nodes matter ------------------------------------------------------------------

    def _live(self) -> set[fx.Node]:
        """Nodes that activations flow through on their way to the output."""
        graph = self.captured.graph
        reached: set[fx.Node] = set()
        for node in graph.nodes:
            entering = node.op == "placeholder" and node.name in self.captured.inputs
            # Learned queries enter a stack without coming from the pixels.
            entering |= node.op == "call_function" and opname(node) == "mark"
            # Sizes that are read off an activation are no activations.
            if _is_size(node):
                continue
            if entering or any(n in reached for n in node.all_input_nodes):
                reached.add(node)
        needed: set[fx.Node] = set()
        for node in reversed(list(graph.nodes)):
            if node.op == "output" or any(user in needed for user in node.users):
                needed.add(node)
        positions = {n for n in needed if n.op == "call_function" and opname(n) in HEAVY}
        return (reached & needed) | positions

    def _module(self, node: fx.Node) -> tuple[str, str]:
        """(key of the innermost module call, its path)."""
        stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
        if not stack:
            return "", ""
        key, (path, _) = list(stack.items())[-1]
        return key, re.sub(rf"^{WRAPPED}\.?", "", path)

    # -- grouping ----------------------------------------------------------------------------

    def _find_groups(self) -> None:
        nodes = [n for n in self.captured.graph.nodes if n in self.live and n.op == "call_function"]
        calls: dict[str, list[fx.Node]] = {}
        for node in nodes:
            calls.setdefault(self._module(node)[0], []).append(node)
        for members in calls.values():
            self._group_leaf(members)
        for node in nodes:
            if opname(node) in ATTENTION:
                self._group_rotary(node)
        for members in calls.values():
            self._group_scans(members)

    def _light(self, node: fx.Node) -> bool:
        name = opname(node)
        return name not in HEAVY and name not in ("mark", "embedding")

    def _claim(self, group: _Group, members: list[fx.Node]) -> None:
        group.nodes = members
        for node in members:
            self.group_of[node] = group

    def _group_leaf(self, members: list[fx.Node]) -> None:
        """All nodes of one call of a module without children: a norm or an activation."""
        _, path = self._module(members[0])
        if path not in self.captured.leaves or not all(map(self._light, members)):
            return
        work = [n for n in members if opname(n) not in VIEWS]
        if not work:
            return
        names = {opname(n) for n in work}
        if names & (NORMS | {"rsqrt"}) or ("mean" in names and names & {"sqrt", "div"}):
            kind = "norm"
        elif names & ACTIVATIONS:
            kind = "activation"
        else:
            return
        self._claim(_Group(kind), members)

    def _group_rotary(self, attention: fx.Node) -> None:
        """Light work between the projections and the attention: rotation by position."""
        for argument, letter in zip(attention.args[:2], "qk", strict=False):
            members: set[fx.Node] = set()
            pending = [argument] if isinstance(argument, fx.Node) else []
            while pending:
                node = pending.pop()
                if (
                    node in members
                    or node not in self.live
                    or node.op != "call_function"
                    or node in self.group_of
                    or not self._light(node)
                ):
                    continue
                members.add(node)
                pending.extend(node.all_input_nodes)
            ordered = [n for n in self.captured.graph.nodes if n in members]
            # A value that others read as well stays an operator of its own.
            while (last := self._read_outside(ordered, attention)) is not None:
                ordered = ordered[last + 1 :]
            work = [n for n in ordered if opname(n) not in VIEWS and opname(n) != "cat"]
            # A single operation is no rotation but scaling, say.
            if len(work) > 1:
                self._claim(_Group("rotary", suffix=f"rotary_{letter}"), ordered)

    def _read_outside(self, chain: list[fx.Node], end: fx.Node) -> int | None:
        """Position of the first node of a chain that other nodes than the chain and `end` read."""
        members = {*chain, end}
        for position, node in enumerate(chain[:-1]):
            if any(user in self.live and user not in members for user in node.users):
                return position
        return None

    def _group_scans(self, members: list[fx.Node]) -> None:
        """Runs of work around products of activations, without softmax: a recurrence."""
        names = {opname(n) for n in members}
        products = (HEAVY - ATTENTION) - {"linear", "addmm", "grouped_mm", "grouped_mm_fallback"}
        if not self.around.marker or names & (ATTENTION | {"softmax"}) or not names & products:
            return
        order = {n: i for i, n in enumerate(self.captured.graph.nodes)}
        run: list[fx.Node] = []
        runs = [run]
        for node in members:
            free = node not in self.group_of and (
                self._light(node) or (opname(node) in products and not self._from_weight(node))
            )
            if free and run and any(self._between(order, run[-1], node)):
                run = []
                runs.append(run)
            if free:
                run.append(node)
        for run in runs:
            if any(opname(n) in products for n in run):
                self._claim(_Group("scan", suffix="scan"), run)

    def _between(self, order: dict[fx.Node, int], first: fx.Node, last: fx.Node) -> Any:
        """Live nodes of other modules between two nodes: a run must not enclose them."""
        nodes = list(order)
        return (
            n in self.live and n.op == "call_function" and n not in (first, last)
            for n in nodes[order[first] + 1 : order[last]]
        )

    # -- emission ----------------------------------------------------------------------------

    def run(self) -> Raised:
        self._find_groups()
        tracer = LaneTracer()
        begun: dict[str, int] = {}
        spans: dict[str, tuple[int, int, str, str]] = {}
        outputs: tuple[str, ...] = ()
        for node in self.captured.graph.nodes:
            if node.op == "placeholder":
                if node in self.live and node.name in self.captured.inputs:
                    self._emit(_Group("input", [node]), node)
                continue
            if node.op == "output":
                outputs = tuple(
                    dict.fromkeys(self.source[a] for a in node.all_input_nodes if a in self.source)
                )
                continue
            if node.op != "call_function" or node not in self.live:
                continue
            if self.around.marker:
                tracer.visit(node)
            name = opname(node)
            if name == "mark":
                self._mark(node, begun, spans, tracer)
                continue
            group = self.group_of.get(node)
            if group is not None:
                if node is group.nodes[-1]:
                    self._emit(group, node)
                else:
                    self.source[node] = self._first_source(node)
            elif name in VIEWS:
                self.source[node] = self._first_source(node)
            else:
                self._emit(_Group(self._kind(node), [node]), node)
        for region in self.regions:
            region.node_operators = self.source
        sites, reasons, operators = self._sites(tracer, spans)
        return Raised(operators, sites, reasons, outputs)

    def _first_source(self, node: fx.Node) -> str:
        for argument in node.all_input_nodes:
            if argument in self.source:
                return self.source[argument]
        return ""

    def _kind(self, node: fx.Node) -> str:
        name = opname(node)
        if name in ATTENTION:
            return "attention"
        if name in HEAVY:
            if name.startswith("grouped_mm"):
                return "experts"
            if name.startswith("conv"):
                return "conv"
            if name in ("linear", "addmm"):
                return "linear"
            weight = self._weight(node)
            if weight is not None and weight.meta["val"].ndim == 3:
                return "experts"
            if weight is not None and weight is node.args[1] and name in ("mm", "matmul"):
                return "linear"
            return "matmul"
        if name in NORMS:
            return "norm"
        if name in ACTIVATIONS:
            return "activation"
        if name in ("mul", "mul_"):
            return "multiply"
        if name in ("add", "add_", "sub"):
            return "add"
        if name == "softmax":
            return "softmax"
        if name in REDUCTIONS:
            return "reduce"
        if name == "embedding":
            return "embedding"
        if name in ("cat", "stack", "index", "gather", "index_select", "roll", "pad", "repeat"):
            return "gather"
        return "elementwise"

    def _weight(self, node: fx.Node) -> fx.Node | None:
        """The parameter a product reads, None where both factors are activations."""
        for argument in node.all_input_nodes:
            origin = argument
            while (
                origin.op == "call_function"
                and opname(origin) in VIEWS
                and origin not in self.live
                and isinstance(origin.args[0], fx.Node)
            ):
                origin = origin.args[0]
            if origin.op == "placeholder" and origin.name in self.captured.parameters:
                value = origin.meta.get("val")
                if isinstance(value, Tensor) and value.ndim >= 2:
                    return origin
        return None

    def _from_weight(self, node: fx.Node) -> bool:
        return opname(node) in HEAVY and opname(node) != "conv1d" and self._weight(node) is not None

    def _emit(self, group: _Group, node: fx.Node) -> None:
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            value = next((v for v in value or () if isinstance(v, Tensor)), None)
        _, path = self._module(group.nodes[0])
        weight = self._weight(node) if group.kind in ("linear", "conv", "experts") else None
        if weight is not None:
            path = self.captured.parameters[weight.name].rpartition(".")[0]
        operator = Operator(
            name="",
            kind=group.kind,
            inputs=self._inputs(group),
            shape=self._shape(tuple(value.shape), group.kind) if value is not None else (),
            module=self.around.prefix + path if path else self.around.prefix.rstrip("."),
            part=self.around.part(self.around.prefix + path),
            layer=_layer_of(path, self.captured.stacks),
        )
        operator = self._describe(operator, group, node, weight)
        suffix = group.suffix or (
            "" if operator.kind in ("linear", "norm", "conv") and path else operator.kind
        )
        name = ".".join(filter(None, (operator.module, suffix)))
        operator = replace(operator, name=self._unique(name))
        self.operators.append(operator)
        self.emitted[operator.name] = node
        working = False
        for member in group.nodes:
            # A cast of the input that opens a norm is still the input: a residual may read it.
            working = working or opname(member) not in VIEWS
            if working or member is node:
                self.source[member] = operator.name

    def _unique(self, name: str) -> str:
        count = self.names.get(name, 0)
        self.names[name] = count + 1
        return f"{name}_{count}" if count else name

    def _inputs(self, group: _Group) -> tuple[str, ...]:
        members = set(group.nodes)
        found = dict.fromkeys(
            self.source[argument]
            for node in group.nodes
            for argument in node.all_input_nodes
            if argument not in members and self.source.get(argument)
        )
        return tuple(found)

    def _shape(self, shape: tuple[int, ...], kind: str) -> tuple[Dim, ...]:
        """Symbolic shape: samples first, multiples of the marker are token counts."""
        marker = self.around.marker
        samples = Dim.of(self.around.samples)
        sizes = [int(s) for s in shape]
        # A projection without a token count is of something else, image states say.
        projected = kind in ("linear", "attention", "norm")
        if marker and not projected and not any(s and s % marker == 0 for s in sizes):
            # Work on chunks of tokens: shared out evenly.
            return (samples, Dim.of("query"), Dim(math.ceil(math.prod(sizes) / marker)))
        dims = tuple(
            Dim.of("query") * (s // marker) if marker and s and s % marker == 0 else Dim(s)
            for s in sizes
        )
        if dims and dims[0] == Dim(1):
            dims = dims[1:]
        return (samples, *dims)

    def _describe(
        self, operator: Operator, group: _Group, node: fx.Node, weight: fx.Node | None
    ) -> Operator:
        """Add the attributes that the kind's cost formula needs."""
        kind = group.kind
        values = [a.meta.get("val") for a in node.all_input_nodes]
        shapes = [tuple(value.shape) for value in values if isinstance(value, Tensor)]
        if kind == "linear":
            added = opname(node) == "addmm"
            # The operand itself, not the parameter behind it: fused weights are read in slices.
            operand: Any = node.args[2 if added else 1]
            rows, columns = (int(s) for s in operand.meta["val"].shape)
            if opname(node) != "linear":
                rows, columns = columns, rows
            bias = (len(node.args) > 2 and node.args[2] is not None) or added
            return operator.having(**{"in": columns, "out": rows, "bias": int(bias)})
        if kind == "conv":
            assert weight is not None
            out, channels, *taps = (int(s) for s in weight.meta["val"].shape)
            bias = len(node.args) > 2 and node.args[2] is not None
            return operator.having(
                **{"in": channels, "out": out, "kernel": math.prod(taps), "bias": int(bias)}
            )
        if kind == "attention":
            return self._describe_attention(operator, node)
        if kind == "experts":
            experts = [s for s in shapes if len(s) == 3 and not self._is_marked(s)]
            count = int(experts[-1][0]) if experts else 1
            sizes = {"in": int(shapes[0][-1]), "out": int(node.meta["val"].shape[-1])}
            return operator.having(**sizes, experts=count)
        if kind == "matmul":
            return operator.having(inner=int(shapes[0][-1]))
        if kind == "scan":
            flops = sum(_product_flops(n) for n in group.nodes if opname(n) in HEAVY)
            return operator.having(flops_per_row=math.ceil(flops / self.around.marker))
        if kind == "embedding":
            entries, width = (int(s) for s in shapes[0][:2])
            return operator.having(entries=entries, width=width)
        if kind == "norm":
            bias = opname(node) == "layer_norm" and len(node.args) > 3 and node.args[3] is not None
            width = int(shapes[0][-1]) if shapes and shapes[0] else 1
            return operator.having(width=width, bias=int(bias))
        if kind in ("activation", "reduce", "elementwise"):
            names = [opname(n) for n in group.nodes if opname(n) not in VIEWS]
            chosen = next((n for n in names if n in ACTIVATIONS), names[0] if names else "copy")
            return operator.having(function=chosen)
        return operator

    def _is_marked(self, shape: tuple[int, ...]) -> bool:
        return (
            any(s and s % self.around.marker == 0 for s in shape) if self.around.marker else False
        )

    def _describe_attention(self, operator: Operator, node: fx.Node) -> Operator:
        query, key, value = (a.meta["val"] for a in node.args[:3])  # type: ignore[union-attr]
        keys = int(key.shape[-2])
        marker = self.around.marker

        def heads(operand: Tensor) -> int:
            # Attention among the states of one token has the tokens where heads stand.
            count = int(operand.shape[1])
            return count // marker if marker and count % marker == 0 else count

        return operator.having(
            heads=heads(query),
            kv_heads=heads(key),
            head_dim=int(query.shape[-1]),
            value_dim=int(value.shape[-1]),
            keys=Dim.of("context") if marker and keys == marker else keys,
        )

    # -- folded layers -----------------------------------------------------------------------

    def _mark(
        self,
        node: fx.Node,
        begun: dict[str, int],
        spans: dict[str, tuple[int, int, str, str]],
        tracer: LaneTracer,
    ) -> None:
        role, path = str(node.args[1]), str(node.args[2])
        before = self._first_source(node)
        self.source[node] = before
        if role == "begin":
            begun[path] = len(self.operators)
            spans[path] = (len(self.operators), -1, before, "")
        elif role == "end":
            start, _, entry, _ = spans[path]
            spans[path] = (start, len(self.operators), entry, before)
            begin = next(
                n
                for n in self.captured.graph.nodes
                if opname(n) == "mark" and n.args[1] == "begin" and n.args[2] == path
            )
            self.regions.append(LayerRegion(path, begin, node))
        else:
            stack_path, _, index = path.rpartition(".")
            like = f"{stack_path}.{self.captured.stacks[stack_path].kinds[int(index)]}"
            start, stop, entry, end = spans[like]
            self.source[node] = self._copy(
                self.operators[start:stop], like, path, entry, before, end
            )

    def _copy(
        self, span: list[Operator], like: str, path: str, entry: str, before: str, end: str
    ) -> str:
        """Append a copy of a layer's operators under another path; return the last one's name."""
        renamed = {entry: before}
        copied: list[Operator] = []
        for operator in span:
            module = _moved(operator.module, self.around.prefix + like, self.around.prefix + path)
            name = self._unique(
                _moved(operator.name, self.around.prefix + like, self.around.prefix + path)
            )
            renamed[operator.name] = name
            inside = module[len(self.around.prefix) :]
            copied.append(
                replace(
                    operator,
                    name=name,
                    module=module,
                    inputs=tuple(dict.fromkeys(renamed.get(i, i) for i in operator.inputs)),
                    layer=_layer_of(inside, self.captured.stacks),
                )
            )
        self.operators.extend(copied)
        return renamed.get(end, before)

    # -- sites -------------------------------------------------------------------------------

    def _sites(
        self, tracer: LaneTracer, spans: dict[str, tuple[int, int, str, str]]
    ) -> tuple[list[Site], list[str], list[Operator]]:
        main = self.around.main_stack
        if main is None or main not in self.captured.stacks:
            return [], [], self.operators
        stack = self.captured.stacks[main]
        narrowed: dict[str, tuple[tuple[str, str], ...]] = {}
        kv_lanes: dict[str, int] = {}
        found: dict[int, list[Site]] = {}
        reasons: list[str] = []
        regions = {r.path: r for r in self.regions}
        kinds: list[int] = sorted(set(stack.kinds))
        for kind in kinds:
            region = regions.get(f"{main}.{kind}")
            if region is None:
                reasons.append(f"{main}.{kind} does not pass a hidden state on")
                continue
            result = find_sites(
                region, tracer, self.live, self._weight_paths(), self._module, self.around.marker
            )
            start, stop, _, _ = spans[region.path]
            kinds_inside = {operator.kind for operator in self.operators[start:stop]}
            if "scan" in kinds_inside and "attention" not in kinds_inside:
                # Stock caches ask the last recurrent layer how far a sequence has come.
                result.sites = [site for site in result.sites if site.kind != "layer"]
                result.reasons.append(f"{region.path}: its recurrent state cannot be left out")
            reasons.extend(result.reasons)
            found[kind] = [
                replace(
                    site,
                    layer=kind,
                    module=self.around.prefix + site.module,
                    bindings=tuple(
                        replace(b, module=self.around.prefix + b.module) for b in site.bindings
                    ),
                )
                for site in result.sites
            ]
            for node, narrowing in result.narrowed.items():
                name = self.source.get(node, "")
                if self.emitted.get(name) is node:
                    narrowed[name] = narrowing
            for node, lanes in result.kv_lanes.items():
                kv_lanes[self.source[node]] = lanes
        return self._expanded_sites(stack, found, narrowed, kv_lanes, spans, reasons)

    def _weight_paths(self) -> dict[fx.Node, str]:
        """Linear node -> path of the module that owns its weight."""
        paths = {}
        for node in self.live:
            if node.op == "call_function" and opname(node) == "linear":
                weight = self._weight(node)
                if weight is not None:
                    paths[node] = self.captured.parameters[weight.name].rpartition(".")[0]
        return paths

    def _expanded_sites(
        self,
        stack: Stack,
        found: dict[int, list[Site]],
        narrowed: dict[str, tuple[tuple[str, str], ...]],
        kv_lanes: dict[str, int],
        spans: dict[str, tuple[int, int, str, str]],
        reasons: list[str],
    ) -> tuple[list[Site], list[str], list[Operator]]:
        """Give every folded layer the sites of the layer it is like."""
        prefix = self.around.prefix + stack.path
        sites: list[Site] = []
        for index, kind in enumerate(stack.kinds):
            like, path = f"{prefix}.{kind}", f"{prefix}.{index}"
            for site in found.get(kind, []):
                sites.append(
                    replace(
                        site,
                        name=f"{site.kind}.{index}",
                        layer=index,
                        module=_moved(site.module, like, path),
                        bindings=tuple(
                            replace(b, module=_moved(b.module, like, path)) for b in site.bindings
                        ),
                    )
                )
        names = {s.name for s in sites}
        operators = []
        for operator in self.operators:
            template = operator.name
            if operator.layer is not None and operator.module.startswith(prefix + "."):
                kind = stack.kinds[operator.layer]
                template = _moved(operator.name, f"{prefix}.{operator.layer}", f"{prefix}.{kind}")
                pairs = tuple(
                    (quantity, f"{site_kind}.{operator.layer}")
                    for quantity, site_kind in narrowed.get(template, ())
                    if f"{site_kind}.{operator.layer}" in names
                )
                operator = replace(operator, narrowed_by=pairs)
                if template in kv_lanes:
                    operator = operator.having(kv_heads=kv_lanes[template])
            operators.append(operator)
        return sites, reasons, operators


def _is_size(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), SymInt | int)


def _moved(path: str, old: str, new: str) -> str:
    """The path with one leading module path replaced by another."""
    if path == old or path.startswith(old + "."):
        return new + path[len(old) :]
    return path


def _layer_of(path: str, stacks: Mapping[str, Stack]) -> int | None:
    """Index of the outermost stack entry that a module path lies in."""
    for stack in sorted(stacks, key=len):
        if path.startswith(stack + "."):
            return int(path[len(stack) + 1 :].split(".")[0])
    return None


def _product_flops(node: fx.Node) -> int:
    """2 * multiply-adds of a product of activations."""
    output = node.meta["val"]
    inner = node.all_input_nodes[0].meta["val"].shape[-1]
    if opname(node).startswith("conv"):
        weight = node.all_input_nodes[1].meta["val"]
        inner = math.prod(weight.shape[1:])
    if opname(node) == "einsum":
        letters = str(node.args[0]).replace(" ", "").split("->")
        operands = letters[0].split(",")
        sizes: dict[str, int] = {}
        for term, argument in zip(operands, node.all_input_nodes, strict=False):
            sizes.update(zip(term, argument.meta["val"].shape, strict=False))
        inner = math.prod(sizes[x] for x in sizes if x not in letters[-1])
    return 2 * int(math.prod(output.shape)) * int(inner)


def raise_operators(captured: Captured, around: Surroundings) -> Raised:
    """Turn a captured module into operators and sites; see the module docstring."""
    return _Raiser(captured, around).run()

"""Raising: from the ATen nodes of a captured module to operators of the Graph.

Views and copies disappear; the nodes of a norm, of an activation, of a rotary embedding or of a
recurrence become one operator each; every product that FlopCounterMode counts is kept. Folded
layers are expanded by copying the operators of the layer they are like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from planner.ir.dims import Dim
from planner.ir.graph import Operator, Site
from planner.ir.lowering.aten import VIEWS, opname
from planner.ir.lowering.capture import Captured
from planner.ir.lowering.describing import Markers, attributes_of, kind_of, symbolic_shape
from planner.ir.lowering.flow import Flow
from planner.ir.lowering.folding import Span, copies, layer_of, narrowed_alike, sites_alike
from planner.ir.lowering.grouping import Group, group_nodes
from planner.ir.lowering.lanes import LaneTracer, TracedLayer
from planner.ir.lowering.sites import find_sites


@dataclass(frozen=True)
class Surroundings:
    """Where a captured module stands in the model."""

    prefix: str  # path of the module inside the model, with a trailing dot, or ""
    part: Callable[[str], str]  # module path -> part of the Graph
    samples: str  # symbol of the leading dimension (``batch`` or ``images``)
    markers: Markers = field(default_factory=Markers)
    main_stack: str | None = None  # path of the stack whose layers can be switched


@dataclass(frozen=True)
class Raised:
    """What a captured module became."""

    operators: list[Operator]  # in order
    sites: list[Site]  # what can be narrowed
    reasons: list[str]  # why other layers and blocks cannot be, one sentence each
    outputs: tuple[str, ...]  # names of the operators whose values leave the module


class _Raiser:
    """Walks the nodes of a captured module once, in order, and collects operators."""

    def __init__(self, captured: Captured, around: Surroundings) -> None:
        self.captured, self.around = captured, around
        self.flow = Flow(captured)
        self.groups = group_nodes(self.flow, recurrences=bool(around.markers.tokens))
        self.tracer = LaneTracer()
        self.operators: list[Operator] = []
        self.taken: dict[str, int] = {}
        # Node -> name of the operator that computes its value; operator -> its last node.
        self.source: dict[fx.Node, str] = {}
        self.emitted: dict[str, fx.Node] = {}
        # Path of a traced layer -> where it stands, and the layer itself once it has ended.
        self.spans: dict[str, Span] = {}
        self.begun: dict[str, fx.Node] = {}
        self.traced: dict[str, TracedLayer] = {}

    def run(self) -> Raised:
        outputs: tuple[str, ...] = ()
        for node in self.captured.graph.nodes:
            if node.op == "output":
                names = (self.source[a] for a in node.all_input_nodes if a in self.source)
                outputs = tuple(dict.fromkeys(names))
            elif node not in self.flow.live:
                continue
            elif node.op == "placeholder" and node.name in self.captured.inputs:
                self._emit(Group("input", (node,)))
            elif node.op == "call_function":
                self._visit(node)
        sites, reasons = self._sites()
        return Raised(self.operators, sites, reasons, outputs)

    def _visit(self, node: fx.Node) -> None:
        if self.around.markers.tokens:
            self.tracer.visit(node)
        group = self.groups.get(node)
        if opname(node) == "mark":
            self._mark(node)
        elif group is None and opname(node) not in VIEWS:
            self._emit(Group(kind_of(node, self.flow), (node,)))
        elif group is not None and node is group.nodes[-1]:
            self._emit(group)
        else:
            self.source[node] = self._first_source(node)

    def _first_source(self, node: fx.Node) -> str:
        return next((self.source[n] for n in node.all_input_nodes if n in self.source), "")

    # -- operators ---------------------------------------------------------------------------

    def _emit(self, group: Group) -> None:
        node, around = group.nodes[-1], self.around
        value = node.meta.get("val")
        if not isinstance(value, Tensor):
            value = next((v for v in value or () if isinstance(v, Tensor)), None)
        _, path = self.flow.module(group.nodes[0])
        weighted = group.kind in ("linear", "conv", "experts")
        weight = self.flow.weight(node) if weighted else None
        if weight is not None:
            path = self.flow.owner(weight)
        shape: tuple[Dim, ...] = ()
        if value is not None:
            sizes = tuple(map(int, value.shape))
            shape = symbolic_shape(sizes, group.kind, around.samples, around.markers)
        operator = Operator(
            name="",
            kind=group.kind,
            inputs=self._inputs(group),
            shape=shape,
            module=around.prefix + path if path else around.prefix.rstrip("."),
            part=around.part(around.prefix + path),
            layer=self._layer(path),
            attributes=attributes_of(group.kind, group.nodes, weight, around.markers),
        )
        named_by_path = group.kind in ("linear", "norm", "conv") and path
        suffix = group.suffix or ("" if named_by_path else group.kind)
        name = self._unique(".".join(filter(None, (operator.module, suffix))))
        self.operators.append(replace(operator, name=name))
        self.emitted[name] = node
        working = False
        for member in group.nodes:
            # A cast of the input that opens a norm is still the input: a residual may read it.
            working = working or opname(member) not in VIEWS
            if working or member is node:
                self.source[member] = name

    def _unique(self, name: str) -> str:
        count = self.taken.get(name, 0)
        self.taken[name] = count + 1
        return f"{name}_{count}" if count else name

    def _inputs(self, group: Group) -> tuple[str, ...]:
        members = set(group.nodes)
        found = dict.fromkeys(
            self.source[argument]
            for node in group.nodes
            for argument in node.all_input_nodes
            if argument not in members and self.source.get(argument)
        )
        return tuple(found)

    # -- layers ------------------------------------------------------------------------------

    def _mark(self, node: fx.Node) -> None:
        """A layer begins or ends, or is left to be copied from the one it is like."""
        role, path = str(node.args[1]), str(node.args[2])
        before = self._first_source(node)
        self.source[node] = before
        here = len(self.operators)
        if role == "begin":
            self.spans[path] = Span(here, here, before, before)
            self.begun[path] = node
        elif role == "end":
            self.spans[path] = replace(self.spans[path], stop=here, end=before)
            self.traced[path] = TracedLayer(
                path, self.begun[path], node, self.flow, self.tracer, self.around.markers.tokens
            )
        else:
            self.source[node] = self._repeat(path, before)

    def _repeat(self, path: str, before: str) -> str:
        """Copy the layer that the one at `path` is like; return the name of the copy's output."""
        stack_path, _, index = path.rpartition(".")
        like = f"{stack_path}.{self.captured.stacks[stack_path].kinds[int(index)]}"
        span, prefix = self.spans[like], self.around.prefix
        renamed = {span.entry: before}

        def layer(module: str) -> int | None:
            return self._layer(module[len(prefix) :])

        traced = self.operators[span.start : span.stop]
        self.operators += copies(traced, prefix + like, prefix + path, renamed, self._unique, layer)
        return renamed.get(span.end, before)

    def _layer(self, path: str) -> int | None:
        """Index of the layer that a module is in; blocks between layers have their own stack."""
        main = self.around.main_stack
        return layer_of(path, self.captured.stacks if main is None else [main])

    # -- sites -------------------------------------------------------------------------------

    def _sites(self) -> tuple[list[Site], list[str]]:
        """Sites of the main stack's layers; the operators are told what narrows them."""
        main = self.around.main_stack
        if main is None or main not in self.captured.stacks:
            return [], []
        stack, prefix = self.captured.stacks[main], self.around.prefix + main
        reasons: list[str] = []
        found: dict[int, list[Site]] = {}
        narrowed: dict[str, tuple[tuple[str, str], ...]] = {}
        kv_lanes: dict[str, int] = {}
        for kind in sorted(set(stack.kinds)):
            layer = self.traced.get(f"{main}.{kind}")
            if layer is None:
                reasons.append(f"{main}.{kind} does not pass a hidden state on")
                continue
            result = find_sites(layer)
            reasons += result.reasons
            found[kind] = [self._in_model(site) for site in result.sites]
            for node, narrowing in result.narrowed.items():
                name = self.source.get(node, "")
                if self.emitted.get(name) is node:
                    narrowed[name] = narrowing
            kv_lanes |= {self.source[node]: lanes for node, lanes in result.kv_lanes.items()}
        sites = sites_alike(stack, prefix, found)
        self.operators = narrowed_alike(self.operators, stack, prefix, sites, narrowed, kv_lanes)
        return sites, reasons

    def _in_model(self, site: Site) -> Site:
        """A site with paths inside the model instead of inside the captured module."""
        prefix = self.around.prefix
        bindings = tuple(replace(b, module=prefix + b.module) for b in site.bindings)
        return replace(site, module=prefix + site.module, bindings=bindings)


def raise_operators(captured: Captured, around: Surroundings) -> Raised:
    """Turn a captured module into operators and sites."""
    return _Raiser(captured, around).run()

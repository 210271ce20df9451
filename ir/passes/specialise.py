"""Specialise: the graph as it runs under a plan."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

from planner.ir.errors import InputError
from planner.ir.graph import Graph, Operator, Site
from planner.ir.kinds import kind_of
from planner.ir.structure import exit_of, narrowed, needed, redirected, residual_entry, within


class KeptLanes(Protocol):
    """What is kept of a site."""

    @property
    def count(self) -> int:
        """How many lanes."""


class Choice(Protocol):
    """What the pass reads of a plan."""

    @property
    def layers_off(self) -> tuple[int, ...]:
        """Layers that do not run, ascending."""

    def kept(self, site: Site) -> KeptLanes:
        """What is kept of a layer, of attention heads or of an MLP."""

    def check(self, graph: Graph) -> None:
        """Raise InputError unless it was made for this graph."""


@dataclass(frozen=True)
class Specialise:
    """Take out the layers, heads and MLP groups that a plan switches off.

    A site that the plan narrowed is decided and leaves the graph, one that it left whole stays.
    Tokens are `planner.ir.passes.NarrowTokens`' work.
    """

    plan: Choice  # made for the graph that the pass is given
    name: ClassVar[str] = "specialise"

    def apply(self, graph: Graph) -> Graph:
        """The graph without what is off; InputError where the plan does not fit it."""
        self.plan.check(graph)
        graph = _without_layers(graph, self.plan.layers_off)
        kept = {site.name: (self.plan.kept(site).count, site.lanes) for site in graph.sites}
        partial = {name: (some, lanes) for name, (some, lanes) in kept.items() if some < lanes}
        empty = {name for name, (some, _) in partial.items() if not some}
        if empty:
            graph = _without_blocks(graph, empty)
        operators = [_decided(narrowed(operator, partial), set(partial)) for operator in graph]
        return graph.replacing(operators, (s for s in graph.sites if s.name not in partial))


def _decided(operator: Operator, sites: set[str]) -> Operator:
    """The operator without reference to sites that are gone."""
    pairs = tuple(pair for pair in operator.narrowed_by if pair[1] not in sites)
    return replace(operator, narrowed_by=pairs) if pairs != operator.narrowed_by else operator


def _without_layers(graph: Graph, layers: tuple[int, ...]) -> Graph:
    """Readers of a layer's output read what the layer read."""
    removed: set[str] = set()
    entries: dict[str, str] = {}
    for layer in layers:
        site = graph.sites_by_name.get(f"layer.{layer}")
        if site is None:
            raise InputError(f"layer {layer} of '{graph.name}' cannot be left out")
        inside = within(graph, site)
        end = exit_of(graph, site, inside)
        entry = residual_entry(graph, site, inside, end)
        # Layers are ascending: where the one before is left out as well, go on to what it read.
        entries[end] = entries.get(entry, entry)
        removed |= inside
    operators = redirected((o for o in graph if o.name not in removed), entries)
    return graph.replacing(operators, (s for s in graph.sites if s.layer not in layers))


def _without_blocks(graph: Graph, sites: set[str]) -> Graph:
    """Take out the blocks that the given sites are in: none of their lanes is kept.

    What such a block adds to the residual stream is zero, or, where its last linear has a bias, a
    constant. A sum loses a zero; a constant stays in it, as other parameters do, unseen.
    """
    zero: dict[str, bool] = {}  # operator with a constant output -> whether it is zero
    same: dict[str, str] = {}  # sum of one input -> that input
    operators: list[Operator] = []
    for stock in graph:
        (operator,) = redirected([stock], same)
        constant = [name for name in operator.inputs if name in zero]
        rest = tuple(name for name in operator.inputs if name not in zero)
        ends_block = any(what == "in" and name in sites for what, name in operator.narrowed_by)
        if ends_block:
            zero[operator.name] = not operator["bias"]
        elif not constant:
            operators.append(operator)
        elif not rest:
            keeps_zero = kind_of(operator).keeps_zero(operator)
            zero[operator.name] = keeps_zero and all(zero[n] for n in constant)
        elif operator.kind == "multiply" and any(zero[n] for n in constant):
            zero[operator.name] = True
        elif operator.kind == "add" and len(rest) == 1 and all(zero[n] for n in constant):
            same[operator.name] = rest[0]
        else:
            operators.append(replace(operator, inputs=rest))
    dead_before = set(graph.by_name) - needed(graph)
    emptied = graph.replacing(operators)
    alive = needed(emptied) | dead_before
    return emptied.replacing(o for o in operators if o.name in alive)

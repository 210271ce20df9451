"""AdaLLaVA's own switch sets, counted the way the paper counts (arXiv 2503.10905, section 3 and its
reference code): switches sit on the upper layers, the others always run, and a budget is a number
of units, not a cost.

- ``adallava-l``: one unit per layer; floor(L * b) layers run in all.
- ``adallava-h``: units of some of a layer's heads together with as many of its MLP groups; of u
  units in a layer floor(L * u * b) run in all.

Both take ``:first=20``, the first layer with switches, by default L/2. ``adallava-h:unit=4`` sets
the heads, and the groups, of a unit. By default they are 8, the authors' `scheduler_rank`, on
models of 32 heads or more; on smaller ones a quarter of a layer, or the next less that divides it.

Counting ignores that layers may cost unequal amounts (after token pruning, say); outside these two
sets planner budgets in cost.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
from typing_extensions import override

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.planning.budgets import Budget
from planner.planning.selectors.arguments import Arguments, read_named
from planner.planning.utilities import Utilities
from planner.solver.problem import Choice, LayerChoices, Problem, SiteChoices, TokenOption
from planner.solver.solution import Infeasible

_UNIT = 8
_LEAST_UNITS = 4  # of a layer, as the authors' 7B model has


def first_switched(graph: Graph, first: int | None = None) -> int:
    """The first layer with switches, by default that of the upper half; InputError where nothing
    would always run, or nothing could be switched."""
    found = graph.layers // 2 if first is None else first
    if graph.layers < 2:
        raise InputError(f"'{graph.name}' has {graph.layers} layers, too few for a scheduler")
    if not 0 < found < graph.layers:
        raise InputError(
            f"switches cannot begin at layer {found} of '{graph.name}': choose 1 to "
            f"{graph.layers - 1}"
        )
    return found


@dataclass(frozen=True)
class Counting(Arguments):
    """Units by the layer; the switches of ``adallava-l``."""

    name: ClassVar[str] = "adallava-l"
    first: int | None = None  # layer with switches

    def per_layer(self, graph: Graph) -> int:
        """Units in a layer."""
        return 1

    def count(self, graph: Graph, budget: Budget) -> int:
        """The units that may be on: floor(L * u * b) - P * u for u units in each of L layers.

        The P layers before the first with switches always run. InputError where the budget is not
        one fraction, or less than what always runs takes.
        """
        limit, *others = budget.limits
        if others or limit.metric != "flops" or not limit.of_base:
            raise InputError(
                f"--switches {self} counts units: give one fraction, such as --budget 0.65"
            )
        first, units = first_switched(graph, self.first), self.per_layer(graph)
        count = math.floor(graph.layers * units * limit.value) - first * units
        if count < 0:
            raise Infeasible(
                f"budget {float(limit.value):g} is less than the layers that always run take, "
                f"{first} of {graph.layers}: {self} cannot keep to less than "
                f"{math.ceil(Fraction(first, graph.layers) * 10_000) / 10_000}"
            )
        return count


@dataclass(frozen=True)
class HeadCounting(Counting):
    """Units of heads and MLP groups; the switches of ``adallava-h``."""

    name: ClassVar[str] = "adallava-h"
    unit: int | None = None  # heads, and groups, of a unit

    def heads(self, graph: Graph) -> int:
        """Heads (KV groups) of a layer with switches, which are as many as MLP groups; InputError
        where a layer has none, or not all have as many."""
        counts = set()
        for layer in range(first_switched(graph, self.first), graph.layers):
            for kind in ("heads", "mlp"):
                if f"{kind}.{layer}" not in graph.sites_by_name:
                    raise InputError(f"'{graph.name}' has no {kind} to switch in layer {layer}")
            counts.add(graph.sites_by_name[f"heads.{layer}"].switches)
        if len(counts) > 1:
            raise InputError(
                f"{self} needs layers that are alike, and '{graph.name}' has "
                f"{', '.join(map(str, sorted(counts)))} KV groups in a layer; use adallava-l"
            )
        return counts.pop()

    def size(self, graph: Graph) -> int:
        """Heads, and groups, of a unit."""
        heads = self.heads(graph)
        most = max(1, min(_UNIT, heads // _LEAST_UNITS))
        usual = max(size for size in range(1, most + 1) if heads % size == 0)
        unit = usual if self.unit is None else self.unit
        if unit < 1 or heads % unit:
            raise InputError(
                f"units of {unit} heads do not divide the {heads} KV groups in a layer of "
                f"'{graph.name}'"
            )
        return unit

    @override
    def per_layer(self, graph: Graph) -> int:
        return self.heads(graph) // self.size(graph)


COUNTINGS: Mapping[str, type[Counting]] = {c.name: c for c in (Counting, HeadCounting)}


def counting_of(text: str) -> Counting | None:
    """Read ``adallava-h:unit=8``; None where the text begins with another name."""
    if text.partition(":")[0].strip() not in COUNTINGS:
        return None
    return read_named(text, COUNTINGS, "counted switches")


def faithful_problem(
    graph: Graph, budget: Budget, utilities: Utilities, counting: Counting
) -> Problem:
    """The counting Problem of ``adallava-l`` or ``adallava-h``."""
    per_layer, first = counting.per_layer(graph), first_switched(graph, counting.first)
    choices = []
    for layer in range(graph.layers):
        here = [s for s in graph.sites_at(layer) if s.kind != "layer"]
        upper = layer >= first
        if not isinstance(counting, HeadCounting):
            worth = sum(float(utilities.of_site(s).sum()) for s in here)
            cost = np.full((1, 1), upper, dtype=np.int64)
            choices.append(LayerChoices(f"layer.{layer}", worth, cost, optional=upper))
            continue
        sites: tuple[SiteChoices, ...] = ()
        if upper:
            values = np.zeros(per_layer)
            for site in here:
                ordered = -np.sort(-utilities.of_site(site))
                for unit, part in enumerate(np.array_split(ordered, per_layer)):
                    values[unit] += part.sum()
            cost = np.arange(per_layer + 1, dtype=np.int64)[None, None, :]
            sites = (SiteChoices(f"units.{layer}", values, cost),)
        nothing = np.zeros((1, 1), dtype=np.int64)
        choices.append(LayerChoices(f"layer.{layer}", 0.0, nothing, sites, optional=False))
    tokens = (TokenOption((), 0.0, np.zeros(1, dtype=np.int64)),)
    count = np.array([counting.count(graph, budget)], dtype=np.int64)
    return Problem(("units",), count, tokens, tuple(choices))


def unfold(choice: Choice, graph: Graph, utilities: Utilities, counting: Counting) -> Choice:
    """Turn units into heads and groups: n of u units keep the n/u most useful of each."""
    kept: dict[str, tuple[int, ...]] = {}
    for site in graph.sites:
        if site.kind == "layer":
            continue
        on = choice.layers_on[site.layer]
        units = choice.kept.get(f"units.{site.layer}")
        count = site.switches if on else 0
        if units is not None:
            parts = np.array_split(np.arange(site.switches), counting.per_layer(graph))
            count = sum(len(part) for part in parts[: len(units)])
        order = np.argsort(-utilities.of_site(site), kind="stable")[:count]
        kept[site.name] = tuple(sorted(int(i) for i in order))
    return Choice(0, choice.layers_on, kept)

"""AdaLLaVA's own switch sets, counted the way the paper counts (arXiv 2503.10905, section 3 and its
reference code): switches sit on the upper half of the layers, the lower half always runs, and a
budget is a number of units, not a cost.

- ``adallava-l``: one unit per layer; floor(L * b) layers run in all.
- ``adallava-h``: units of a quarter of a layer's heads together with a quarter of its MLP groups
  (8 and 8 of 32 on the 7B model); floor(4 * L * b) units run in all.

Counting ignores that layers may cost unequal amounts (after token pruning, say); outside these two
sets planner budgets in cost.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.planning.budgets import Budget
from planner.planning.utilities import Utilities
from planner.solver.problem import Choice, LayerChoices, Problem, SiteChoices, TokenOption

UNITS_PER_LAYER = 4


def first_counted(layers: int) -> int:
    """The first layer of the upper half, where switches begin."""
    return layers // 2


def unit_count(layers: int, fraction: Fraction, per_layer: int = 1) -> int:
    """Units switched on in the upper half: ``max(0, floor(L * u * b) - L/2 * u)``."""
    lower = first_counted(layers) * per_layer
    return max(0, math.floor(layers * per_layer * fraction) - lower)


def counted_fraction(budget: Budget, name: str) -> Fraction:
    """The one fraction that a counting switch set can keep to; InputError for any other budget."""
    first, *others = budget.limits
    if others or first.metric != "flops" or not first.of_base:
        raise InputError(
            f"--switches {name} counts units: give one fraction, such as --budget 0.65"
        )
    return first.value


def faithful_problem(graph: Graph, budget: Budget, utilities: Utilities, name: str) -> Problem:
    """The counting Problem of ``adallava-l`` or ``adallava-h``."""
    layers = graph.layers
    per_layer = 1 if name == "adallava-l" else UNITS_PER_LAYER
    count = unit_count(layers, counted_fraction(budget, name), per_layer)
    choices = []
    for layer in range(layers):
        here = [s for s in graph.sites_at(layer) if s.kind != "layer"]
        worth = sum(float(utilities.of_site(s).sum()) for s in here)
        upper = layer >= first_counted(layers)
        nothing = np.zeros((1, 1), dtype=np.int64)
        if name == "adallava-l":
            cost = np.ones((1, 1), dtype=np.int64) if upper else nothing
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
        choices.append(LayerChoices(f"layer.{layer}", 0.0, nothing, sites, optional=False))
    tokens = (TokenOption((), 0.0, np.zeros(1, dtype=np.int64)),)
    return Problem(("units",), np.array([count], dtype=np.int64), tokens, tuple(choices))


def unfold(choice: Choice, graph: Graph, utilities: Utilities) -> Choice:
    """Turn units into heads and groups: n of 4 units keep the n/4 most useful of each."""
    kept: dict[str, tuple[int, ...]] = {}
    for site in graph.sites:
        if site.kind == "layer":
            continue
        on = choice.layers_on[site.layer]
        units = choice.kept.get(f"units.{site.layer}")
        count = site.switches if on else 0
        if units is not None:
            parts = np.array_split(np.arange(site.switches), UNITS_PER_LAYER)
            count = sum(len(part) for part in parts[: len(units)])
        order = np.argsort(-utilities.of_site(site), kind="stable")[:count]
        kept[site.name] = tuple(sorted(int(i) for i in order))
    return Choice(0, choice.layers_on, kept)

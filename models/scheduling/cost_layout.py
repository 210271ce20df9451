"""Layers, heads and MLP groups side by side, each at what it costs; budgets from the cost model.

A limit is what the switches that are on may cost, and switches are taken by logit while they fit.
So no plan passes its budget, whatever the logits are, and what a plan leaves of it is less than the
cheapest switch that could still be on.
"""

from __future__ import annotations

import math
import re
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cached_property
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.ir.graph import Graph
from planner.models.scheduling.layouts import Columns, Layout, Taken, columns_of
from planner.plan import TokenStage
from planner.planning.budgets import Budget, Limit
from planner.planning.compiler import DEFAULT_DEVICE
from planner.planning.pricing import Pricing
from planner.planning.selectors import whole_selector
from planner.planning.switches import AXES, SwitchSet, with_switches
from planner.planning.unit_counting import first_switched
from planner.planning.utilities import uniform
from planner.solver import Infeasible, take_while_fits
from planner.solver.problem import Choice, Problem

# Of the metrics of `planner.planning.budgets`: a scheduler keeps all weights in memory.
_METRICS = ("flops", "kv", "latency")
# Options of a name, as fields of `PricedSwitches`.
_NUMBERS = {"groups": "groups", "first": "first_layer"}
# How many workloads stay priced.
_POSED = 64


def read_axes(
    text: str, words: Sequence[str] = ()
) -> tuple[tuple[str, ...], dict[str, Any], dict[str, str]]:
    """Of ``layers,heads:groups=16,first=5``: axes, fields of `PricedSwitches`, and other options.

    `words` are what the others may be.
    """
    axes, colon, arguments = text.partition(":")
    switches = SwitchSet.parse(axes)
    if switches.counting or axes == "all":
        raise InputError(
            f"a scheduler cannot have the switches '{axes}': choose some of {', '.join(AXES)}"
        )
    found: dict[str, str] = {}
    for argument in arguments.split(",") if colon else ():
        key, _, value = argument.partition("=")
        good = key in words or (key in _NUMBERS and re.fullmatch("[1-9][0-9]*", value))
        if not good or key in found:
            raise InputError(
                f"the switches '{text}' should end in :groups=16,first=5, or one of both"
            )
        found[key] = value
    numbers = {_NUMBERS[key]: int(value) for key, value in found.items() if key in _NUMBERS}
    return switches.axes, numbers, {key: found[key] for key in words if key in found}


def name_of(axes: Sequence[str], options: Mapping[str, Any]) -> str:
    """What `read_axes` reads; options that are None are left out."""
    shown = ",".join(f"{key}={value}" for key, value in options.items() if value is not None)
    return ",".join(axes) + (f":{shown}" if shown else "")


@dataclass(frozen=True)
class PricedSwitches(Layout):
    """Some of layers, heads (KV groups) and MLP groups of the upper half, each at its own cost.

    Limits are in FLOPs, bytes or seconds above `always`.
    """

    axes: tuple[str, ...]  # some of layers, heads and mlp
    groups: int | None = None  # of every MLP; None for one per head
    first_layer: int | None = None  # with switches; None for that of the upper half
    metric: str = "flops"  # of budgets
    # That costs are for; None for one image, 64 text tokens and nothing generated.
    workload: Workload | None = None
    stages: tuple[TokenStage, ...] = ()  # in front of the switches
    device: str = DEFAULT_DEVICE  # that seconds are of

    always_run: ClassVar[str] = "the layers that always run"

    @property
    @override
    def name(self) -> str:
        return name_of(self.axes, {"groups": self.groups, "first": self.first_layer})

    @property
    @override
    def first(self) -> int:
        return first_switched(self.graph, self.first_layer)

    @property
    @override
    def measure(self) -> str:
        return self.metric

    @property
    @override
    def levels(self) -> int:
        """The number of switches, which with equal costs is what the paper has."""
        return max(1, self.size)

    @cached_property
    def _posed(self) -> dict[Any, Self]:
        return {}

    @override
    def under(
        self,
        workload: Workload | None = None,
        stages: Sequence[TokenStage] = (),
        metric: str = "flops",
        device: str = DEFAULT_DEVICE,
    ) -> Self:
        super().under(workload, stages, metric)
        if metric not in _METRICS:
            raise InputError(
                f"a scheduler cannot keep to {metric}: choose from {', '.join(_METRICS)}"
            )
        ahead = tuple(stages)
        key = (metric, workload, ahead, device)
        if key not in self._posed:
            if len(self._posed) >= _POSED:
                self._posed.pop(next(iter(self._posed)))
            self._posed[key] = replace(
                self, metric=metric, workload=workload, stages=ahead, device=device
            )
        return self._posed[key]

    @property
    @abstractmethod
    def pricing(self) -> Pricing:
        """What everything costs; budgets are fractions of its base model."""

    @override
    def limit(self, budget: Budget) -> int:
        """At most the cost of everything, however large the budget is."""
        metrics = [limit.metric for limit in budget.limits]
        if metrics != [self.metric]:
            raise InputError(
                f"{self.name} keeps to one limit of {self.metric} here, not to {', '.join(metrics)}"
            )
        allowed = self.pricing.limits(budget)[self.metric] - self.always
        if allowed < 0:
            base = self.pricing.limits(Budget.of(f"{self.metric}=100%"))[self.metric]
            raise Infeasible(
                f"{budget.limits[0]} is less than {self.always_run} take, "
                f"{math.ceil(self.always / base * 1e4) / 1e4} of the base model's {self.metric}"
            )
        return min(allowed, self.steps)


@dataclass(frozen=True)
class CostSwitches(PricedSwitches):
    """Layers, heads and MLP groups under one budget.

    Its name is that of its axes, such as ``layers,heads,mlp``, and ends in ``:groups=16`` if an MLP
    does not have one group per head, as in the papers, in ``:first=5`` or ``:groups=16,first=5`` if
    switches do not begin in the middle. Logits go by layer: first the layer's own, then its heads',
    then its groups'. If a layer is off, so are its heads and groups.

    A budget is a share of the base model's language model, without the latency token. Token stages
    in front of the switches save cost, which the switches may spend: layers are priced with the
    tokens left.
    """

    @staticmethod
    def parse(text: str, graph: Graph) -> CostSwitches:
        """Read ``layers,heads,mlp`` or ``heads,mlp:groups=16``."""
        axes, options, _ = read_axes(text)
        return CostSwitches(graph, axes, **options)

    @cached_property
    @override
    def pricing(self) -> Pricing:
        graph = with_switches(self.graph, self.groups, like_heads=True)
        load = self.workload or Workload.default(graph, new_tokens=0)
        switches = SwitchSet(",".join(self.axes), self.axes)
        selectors = {str(whole_selector(stage)) for stage in self.stages}
        if len(selectors) > 1:
            raise InputError("budgets in cost need token stages that are all of one selector")
        if selectors:
            switches = switches.with_selector(selectors.pop(), load.image_tokens)
        return Pricing(graph, load, switches, device(self.device), "llm")

    @cached_property
    def problem(self) -> Problem:
        """The switches with their costs, in the order of logits; the limit is the base model's."""
        lower = self.first
        pricing = self.pricing
        everything = Budget((Limit(self.metric, Fraction(1), of_base=True),))
        problem = pricing.problem(everything, uniform(pricing.graph, pricing.work()))
        layers = [
            # Always on, sites and all.
            replace(
                layer,
                costs=layer.costs + sum(site.costs[:, :, -1] for site in layer.sites),
                optional=False,
                sites=(),
            )
            for layer in problem.layers[:lower]
        ]
        problem = replace(problem, layers=(*layers, *problem.layers[lower:]))
        if self.axes and not problem.switches:
            raise InputError(f"'{self.graph.name}' has no {' or '.join(self.axes)} to switch")
        return problem

    @property
    @override
    def always(self) -> int:
        return int(self.problem.smallest_costs()[0, 0])

    @property
    @override
    def steps(self) -> int:
        return int(self.problem.cost(Choice.everything(self.problem))[0]) - self.always

    @override
    def decide(self, logits: Tensor, limits: Tensor) -> Taken:
        """By logit while they fit, see `planner.solver.take_while_fits`."""
        rows = []
        utilities = logits.detach().double().cpu().numpy()
        for row, limit in zip(utilities, (self.always + limits.cpu()).numpy(), strict=True):
            problem = replace(self.problem.with_utilities(row), limits=limit[None])
            rows.append(problem.flags_of(take_while_fits(problem)))
        return torch.from_numpy(np.stack(rows)).to(logits.device)

    @override
    def spent(self, taken: Taken) -> int:
        choice = self.problem.choice_of(taken.bool().cpu().numpy())
        return int(self.problem.cost(choice)[0]) - self.always

    @cached_property
    @override
    def columns(self) -> dict[int, Columns]:
        """A layer that can be off is off where nothing of it is left."""
        known, removable = self.pricing.graph.sites_by_name, self.graph.sites_by_name
        layers = []
        for index, layer in enumerate(self.problem.layers):
            sites = [known[site.name] for site in layer.sites]
            if layer.optional or sites:
                vanishes = f"layer.{index}" in removable and len(sites) == 2
                layers.append((index, layer.optional, sites, vanishes))
        return columns_of(layers)

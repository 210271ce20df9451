"""Layers, heads and MLP groups side by side, each at what it costs; budgets from the cost model.

The paper's layouts count, which is right as long as all switches cost the same. Here a limit is
what the switches that are on may cost - FLOPs or KV bytes - and switches are taken by logit while
they fit. So no plan passes its budget, whatever the logits are, and what a plan leaves of it is
less than the cheapest switch that could still be on.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.cost.device_table import device
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.models.running.masked import Gates
from planner.models.scheduling.layouts import Layout, Taken, upper_half
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget, Limit
from planner.planning.compiler import DEFAULT_DEVICE
from planner.planning.pricing import Pricing
from planner.planning.selectors import selector_of
from planner.planning.switches import AXES, SwitchSet, with_switches
from planner.planning.utilities import uniform
from planner.solver import Infeasible, Scores, take_while_fits
from planner.solver.problem import Choice, Problem

# Of the metrics of `planner.planning.budgets`: a scheduler keeps all weights in memory, and knows
# no device.
_METRICS = ("flops", "kv")
# How many workloads stay priced.
_POSED = 64


@dataclass(frozen=True)
class _Columns:
    """Where a layer's switches stand among the logits.

    Attributes:
        own: of the layer itself; None where it has none.
        sites: by kind, heads before mlp.
        vanishes: whether the layer is off when all its heads and groups are.
    """

    own: int | None
    sites: dict[str, slice]
    vanishes: bool

    @property
    def all(self) -> slice:
        """All of them, which stand side by side."""
        places = [*self.sites.values()]
        first = places[0].start if self.own is None else self.own
        return slice(first, places[-1].stop if places else first + 1)


@dataclass(frozen=True)
class CostSwitches(Layout):
    """Layers, heads (KV groups) and MLP groups of the upper half, each at its own cost.

    Its name is that of its axes, such as ``layers,heads,mlp``, and ends in ``:groups=16`` if an MLP
    does not have one group per head, as in the papers. Logits go by layer: first the layer's own,
    then its heads', then its groups'. If a layer is off, so are its heads and groups.

    A limit is in FLOPs or bytes, and counts only what can be switched. A budget is a share of the
    base model's language model, without the latency token. Token stages in front of the switches
    save cost, which the switches may spend: layers are priced with the tokens that are left.

    Attributes:
        axes: some of layers, heads and mlp.
        groups: of every MLP; None for one per head.
        metric: of budgets.
        workload: token counts that costs are for; None for one image, 64 text tokens and nothing
            generated.
        stages: token stages in front of the switches.
    """

    axes: tuple[str, ...]
    groups: int | None = None
    metric: str = "flops"
    workload: Workload | None = None
    stages: tuple[TokenStage, ...] = ()
    _posed: dict[Any, CostSwitches] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def parse(text: str, graph: Graph) -> CostSwitches:
        """Read ``layers,heads,mlp`` or ``heads,mlp:groups=16``.

        Raises:
            InputError: these are no such switches, or the model has none of them.
        """
        axes, colon, arguments = text.partition(":")
        switches = SwitchSet.parse(axes)
        if switches.faithful or "tokens" in switches.axes:
            raise InputError(
                f"a scheduler cannot have the switches '{axes}': "
                f"choose some of {', '.join(AXES[1:])}"
            )
        groups = None
        if colon:
            key, _, value = arguments.partition("=")
            if key != "groups" or not value.isdecimal() or not int(value):
                raise InputError(f"the switches '{text}' should end in :groups=16 or alike")
            groups = int(value)
        return CostSwitches(graph, switches.axes, groups)

    @property
    @override
    def name(self) -> str:
        return ",".join(self.axes) + (f":groups={self.groups}" if self.groups else "")

    @property
    @override
    def measure(self) -> str:
        return self.metric

    @override
    def under(
        self,
        workload: Workload | None = None,
        stages: Sequence[TokenStage] = (),
        metric: str = "flops",
    ) -> CostSwitches:
        self.check_stages(stages)
        if metric not in _METRICS:
            raise InputError(
                f"a scheduler cannot keep to {metric}: choose from {', '.join(_METRICS)}"
            )
        key = (metric, workload, tuple(stages))
        if key not in self._posed:
            if len(self._posed) >= _POSED:
                self._posed.pop(next(iter(self._posed)))
            self._posed[key] = replace(
                self, metric=metric, workload=workload, stages=tuple(stages), _posed={}
            )
        return self._posed[key]

    # -- costs -------------------------------------------------------------------------------------

    @cached_property
    def pricing(self) -> Pricing:
        """What everything costs."""
        graph = with_switches(self.graph, self.groups, like_heads=True)
        load = self.workload or Workload.default(graph, new_tokens=0)
        switches = SwitchSet(",".join(self.axes), self.axes)
        selectors = {str(selector_of(stage)) for stage in self.stages}
        if len(selectors) > 1:
            raise InputError("budgets in cost need token stages that are all of one selector")
        if selectors:
            switches = switches.with_selector(selectors.pop(), load.image_tokens)
        return Pricing(graph, load, switches, device(DEFAULT_DEVICE), "llm")

    @cached_property
    def problem(self) -> Problem:
        """The switches with their costs, in the order of logits; the limit is the base model's.

        Raises:
            InputError: the model has none of these switches.
        """
        lower = upper_half(self.graph)[0]
        pricing = self.pricing
        everything = Budget((Limit(self.metric, fraction=Fraction(1)),))
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
        if not problem.switches:
            raise InputError(f"'{self.graph.name}' has no {' or '.join(self.axes)} to switch")
        return problem

    @property
    @override
    def always(self) -> int:
        return int(self.problem.smallest_costs()[0, 0])

    @property
    @override
    def switch_names(self) -> tuple[str, ...]:
        return self.problem.switch_names

    @property
    @override
    def steps(self) -> int:
        return int(self.problem.cost(Choice.everything(self.problem))[0]) - self.always

    @property
    @override
    def levels(self) -> int:
        """The number of switches, which with equal costs is what the paper has."""
        return self.size

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
            base = int(self.problem.limits[0])
            raise Infeasible(
                f"{budget.limits[0]} is less than the layers that always run take, "
                f"{math.ceil(self.always / base * 1e4) / 1e4} of the base model's {self.metric}",
                {self.metric: self.always},
            )
        return min(allowed, self.steps)

    # -- from logits to plans ----------------------------------------------------------------------

    @override
    def decide(self, logits: Tensor, limits: Tensor) -> Taken:
        """By logit while they fit, see `planner.solver.take_while_fits`."""
        rows = [
            problem.flags_of(take_while_fits(problem, Scores.of_utilities(problem)))
            for problem in (
                replace(
                    self.problem.with_utilities(row),
                    limits=np.array([self.always + limit], dtype=np.int64),
                )
                for row, limit in zip(
                    logits.detach().double().cpu().numpy(), limits.tolist(), strict=True
                )
            )
        ]
        return torch.from_numpy(np.stack(rows)).to(logits.device)

    @override
    def spent(self, taken: Taken) -> int:
        choice = self.problem.choice_of(taken.bool().cpu().numpy())
        return int(self.problem.cost(choice)[0]) - self.always

    @cached_property
    def _columns(self) -> dict[int, _Columns]:
        found, place = {}, 0
        for index, layer in enumerate(self.problem.layers):
            own = place if layer.optional else None
            place += layer.optional
            sites = {}
            for site in layer.sites:
                sites[site.name.partition(".")[0]] = slice(place, place + site.switches)
                place += site.switches
            if own is not None or sites:
                removable = f"layer.{index}" in self.graph.sites_by_name
                found[index] = _Columns(own, sites, removable and set(sites) == {"heads", "mlp"})
        return found

    @override
    def by_layer(self) -> dict[int, slice]:
        return {layer: columns.all for layer, columns in self._columns.items()}

    @override
    def gates(self, taken: Taken) -> Gates:
        """A layer with nothing left is off."""
        values = taken if taken.is_floating_point() else taken.float()
        layers: dict[int, Tensor] = {}
        kinds: dict[str, dict[int, Tensor]] = {"heads": {}, "mlp": {}}
        for layer, columns in self._columns.items():
            for kind, place in columns.sites.items():
                kinds[kind][layer] = values[:, place]
            gate = None if columns.own is None else values[:, columns.own]
            if columns.vanishes and taken.requires_grad:
                # With all its switches at 0 the layer adds nothing (but biases). A closed gate
                # besides would hide them from the gradient, and it would never learn to come back.
                gate = None if gate is None else torch.where(gate > 0, gate, 1)
            elif columns.vanishes:
                left = torch.stack([values[:, p].amax(-1) for p in columns.sites.values()]).amax(0)
                gate = left if gate is None else gate * left
            if gate is not None:
                layers[layer] = gate
        return Gates(layers=layers, heads=kinds["heads"], mlp=kinds["mlp"])

    @override
    def plan(self, taken: Taken, base: Plan) -> Plan:
        """A layer with nothing left is off."""
        row = taken.bool().cpu()
        off: list[int] = []
        kept: list[tuple[Site, list[int]]] = []
        for layer, columns in self._columns.items():
            sites = {kind: row[place] for kind, place in columns.sites.items()}
            closed = columns.own is not None and not row[columns.own]
            if closed or (columns.vanishes and not any(on.any() for on in sites.values())):
                off.append(layer)
            for kind, on in sites.items():
                site = self.pricing.graph.sites_by_name[f"{kind}.{layer}"]
                kept.append((site, on.nonzero().flatten().tolist()))
        return replace(base, layers_off=tuple(off)).keeping(kept)

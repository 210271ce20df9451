"""Which switches a scheduler's logits stand for, and how logits become plans that keep to a budget.

AdaLLaVA (arXiv 2503.10905), section 3.5: switches sit on the upper half of the decoder; the lower
half always runs and carries the latency token to the scheduler. A budget is a number of switches
(``adallava-l``: layers; ``adallava-h``: units of heads and MLP groups).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor
from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.errors import InputError
from planner.ir.graph import Graph, Site
from planner.models.running.masked import Gates
from planner.plan import Plan, TokenStage
from planner.planning.budgets import Budget
from planner.planning.compiler import DEFAULT_DEVICE
from planner.planning.plan_costs import PlanCosts
from planner.planning.unit_counting import Counting, HeadCounting, first_switched

# Which switches are on, (batch, size), one column per logit: bool, or 0 and 1 with a gradient.
Taken = Tensor


@dataclass(frozen=True)
class Columns:
    """Where a layer's switches stand among the logits, side by side."""

    all: slice
    has_own: bool  # whether the first is the layer's own
    sites: dict[Site, slice]  # of which the others are, heads before MLP
    vanishes: bool  # whether the layer is off when all its heads and groups are


def columns_of(layers: Iterable[tuple[int, bool, Sequence[Site], bool]]) -> dict[int, Columns]:
    """Give every layer's switches their places: from (layer, has_own, sites, vanishes) each."""
    columns, place = {}, 0
    for layer, has_own, sites, vanishes in layers:
        first, place = place, place + has_own
        places = {}
        for site in sites:
            places[site] = slice(place, place + site.switches)
            place += site.switches
        columns[layer] = Columns(slice(first, place), has_own, places, vanishes)
    return columns


@dataclass(frozen=True)
class Layout(ABC):
    """Switches in the order of a scheduler's logits."""

    graph: Graph

    @property
    @abstractmethod
    def name(self) -> str:
        """Its name for users, see `planner.models.scheduling.scheduler.layout_of`."""

    @property
    @abstractmethod
    def columns(self) -> dict[int, Columns]:
        """Layer -> where its switches stand; raises InputError where the model cannot have them."""

    @property
    def measure(self) -> str:
        """The unit of limits: ``switches``, or a metric of the cost model."""
        return "switches"

    @property
    def always(self) -> int:
        """The cost of what always runs, in the unit of limits; 0 where switches are counted."""
        return 0

    @property
    def first(self) -> int:
        """The decoder layer where the switches begin; layers before it always run."""
        return first_switched(self.graph)

    @property
    def switched(self) -> list[int]:
        """The layers with switches; raises InputError where there are none, or no others."""
        return list(range(self.first, self.graph.layers))

    @property
    def size(self) -> int:
        """How many logits there are."""
        return max((columns.all.stop for columns in self.columns.values()), default=0)

    @property
    def switch_names(self) -> tuple[str, ...]:
        """In the order of logits: ``layer.4``, ``heads.4[0]``, ``mlp.4[2]``."""
        names: list[str] = []
        for layer, columns in self.columns.items():
            names += [f"layer.{layer}"] if columns.has_own else []
            for site in columns.sites:
                names += [f"{site.name}[{index}]" for index in range(site.switches)]
        return tuple(names)

    @property
    @abstractmethod
    def steps(self) -> int:
        """The largest limit; at it everything is on."""

    @property
    def levels(self) -> int:
        """K of the latency encoder, which stands for `steps`."""
        return self.steps

    def under(
        self,
        workload: Workload | None = None,
        stages: Sequence[TokenStage] = (),
        metric: str = "flops",
        device: str = DEFAULT_DEVICE,
    ) -> Layout:
        """The same switches, with limits and costs for prompts of a workload (None: of training).

        Where switches are counted, all prompts are alike; `device` is what seconds are of. Raises
        InputError where a token stage is behind the first switch, or budgets cannot be in this
        metric.
        """
        for stage in stages:
            if stage.layer > self.first:
                raise InputError(
                    f"a token stage at layer {stage.layer} is behind the first switch of "
                    f"{self.name}, layer {self.first}"
                )
        return self

    @abstractmethod
    def limit(self, budget: Budget) -> int:
        """The limit that a budget sets, 0 to `steps`; raises InputError if it cannot be kept to."""

    @property
    def inner(self) -> Layout:
        """The layout of the switches that logits stand for: what is decided inside the decoder."""
        return self

    def decision(self, taken: Taken, options: Tensor | None = None) -> Tensor:
        """What is remembered of a batch's decisions, one row a sample, as `spent` and `plan` take.

        `options`, shape (batch,), are the token counts chosen, where a layout has them, by index.
        """
        return taken.bool().cpu()

    @abstractmethod
    def decide(self, logits: Tensor, limits: Tensor) -> Taken:
        """The best-scored switches that limits (batch,) allow, for logits (batch, size)."""

    @abstractmethod
    def spent(self, taken: Taken) -> int:
        """How much of a limit one sample's switches, shape (size,), use up."""

    def gates(self, taken: Taken) -> Gates:
        """Gates of the masked model; a gradient of `taken` goes through them."""
        values = taken if taken.is_floating_point() else taken.float()
        layers: dict[int, Tensor] = {}
        kinds: dict[str, dict[int, Tensor]] = {"heads": {}, "mlp": {}}
        for layer, columns in self.columns.items():
            for site, place in columns.sites.items():
                kinds[site.kind][layer] = values[:, place]
            gate = values[:, columns.all.start] if columns.has_own else None
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

    def plan(self, taken: Taken, base: Plan) -> Plan:
        """One sample's switches, shape (size,), as a plan; layers and sites apart as in `base`."""
        row = taken.bool().cpu()
        off: list[int] = []
        kept: list[tuple[Site, list[int]]] = []
        for layer, columns in self.columns.items():
            sites = {site: row[place] for site, place in columns.sites.items()}
            closed = columns.has_own and not row[columns.all.start]
            if closed or (columns.vanishes and not any(on.any() for on in sites.values())):
                off.append(layer)
            kept += [(site, on.nonzero().flatten().tolist()) for site, on in sites.items()]
        return replace(base, layers_off=tuple(off)).keeping(kept)

    def flops_fraction(
        self, row: Tensor, base: Plan, costs: PlanCosts, kept: Mapping[int, int] | None = None
    ) -> float:
        """FLOPs of a prefill under one decision, over the base model's; `costs` are of the prompt.

        They are worked out anew, from the plan. `kept`: as of `PlanCosts.of`.
        """
        return costs.of(self.plan(row, base), kept)["flops"]["fraction"]

    def utilisation(self, spent: Sequence[int], limit: int) -> float:
        """The mean share of the budget that is used, with what always runs; 1 if it is 0."""
        whole = len(spent) * (self.always + limit)
        return (len(spent) * self.always + sum(spent)) / whole if whole else 1.0

    def example(self, limit: int, tokens: Sequence[TokenStage] = ()) -> Plan:
        """A plan at a limit, the lowest layers first.

        All plans at one limit cost the same where switches are counted, else about the same.
        """
        base = Plan.of(self.graph, tokens=tuple(tokens))
        order = -torch.arange(self.size).float()[None]
        return self.plan(self.decide(order, torch.tensor([limit]))[0], base)


@dataclass(frozen=True)
class CountedSwitches(Layout):
    """Switches that are counted, see `planner.planning.unit_counting`."""

    counting: Counting

    @property
    @override
    def name(self) -> str:
        return str(self.counting)

    @property
    @override
    def first(self) -> int:
        return first_switched(self.graph, self.counting.first)

    @override
    def limit(self, budget: Budget) -> int:
        return self.counting.count(self.graph, budget)


@dataclass(frozen=True)
class LayerSwitches(CountedSwitches):
    """AdaLLaVA-L: one switch for each layer of the upper half."""

    @cached_property
    @override
    def columns(self) -> dict[int, Columns]:
        missing = [n for n in self.switched if f"layer.{n}" not in self.graph.sites_by_name]
        if missing:
            raise InputError(f"'{self.graph.name}' cannot do without layer {missing[0]}")
        return columns_of((layer, True, (), False) for layer in self.switched)

    @property
    @override
    def steps(self) -> int:
        return self.size

    @override
    def decide(self, logits: Tensor, limits: Tensor) -> Taken:
        ranks = logits.argsort(dim=-1, descending=True, stable=True).argsort(-1)
        return ranks < limits.to(ranks)[:, None]

    @override
    def spent(self, taken: Taken) -> int:
        return int(taken.sum())


@dataclass(frozen=True)
class UnitSwitches(CountedSwitches):
    """AdaLLaVA-H: a logit per head and per MLP group of the upper half, taken in units.

    The layer of the best logit that is left gives its best heads and, independently, its best
    groups that are left, as many as a unit has (8 and 8 on the 7B model). Under grouped-query
    attention a switch is a KV group. There are as many MLP groups as heads. Logits go by layer,
    heads before groups.
    """

    counting: HeadCounting

    @cached_property
    @override
    def columns(self) -> dict[int, Columns]:
        """A layer with nothing left is off, with its biases too."""
        known, heads = self.graph.sites_by_name, self.heads
        _ = self.rank
        sites = (
            [replace(known[f"{kind}.{n}"], switches=heads) for kind in ("heads", "mlp")]
            for n in self.switched
        )
        return columns_of((n, False, own, True) for n, own in zip(self.switched, sites))

    @cached_property
    def heads(self) -> int:
        """Switches of an attention block, and of an MLP."""
        return self.counting.heads(self.graph)

    @cached_property
    def rank(self) -> int:
        """Heads, and groups, in a unit."""
        return self.counting.size(self.graph)

    @property
    @override
    def steps(self) -> int:
        return len(self.columns) * self.counting.per_layer(self.graph)

    @override
    def decide(self, logits: Tensor, limits: Tensor) -> Taken:
        taken = torch.zeros_like(logits, dtype=torch.bool)
        for step in range(int(limits.max()) if len(limits) else 0):
            unit = self.next_unit(logits, taken)
            taken = taken | (unit & (step < limits)[:, None])
        return taken

    @override
    def spent(self, taken: Taken) -> int:
        return int(taken.sum()) // (2 * self.rank)

    def next_unit(self, logits: Tensor, taken: Taken) -> Taken:
        """The unit that comes after those taken; shape (batch, size), bool."""
        batch, heads = len(logits), self.heads
        left = logits.detach().masked_fill(taken, -torch.inf)
        layer = left.argmax(-1) // (2 * heads)
        sites = left.view(batch, -1, 2, heads)
        rows = torch.arange(batch, device=logits.device)
        # (batch, 2, rank); of equal logits the first.
        best = sites[rows, layer].argsort(dim=-1, descending=True, stable=True)[..., : self.rank]
        unit = torch.zeros_like(sites, dtype=torch.bool)
        unit[rows, layer] = torch.zeros_like(sites[:, 0], dtype=torch.bool).scatter(-1, best, True)
        return unit.view(batch, -1)

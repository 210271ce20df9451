"""Image tokens beside layers, heads and MLP groups, under one budget in cost.

The vision side chooses first, before the decoder: one of some token counts, and so many tokens. A
count is open to it if the layers that always run fit the budget with it, and if the switches can
use the budget up. What the tokens leave of the budget is for the switches, which are
taken by logit while they fit. So no plan passes its budget, whatever the networks say, and what is
left is less than the cheapest switch that is off.

The controller's own cost is part of every plan: its products, and the latency token in the prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor
from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.errors import InputError, check_known
from planner.ir.graph import Graph
from planner.models.running.masked import Gates
from planner.models.scheduling.cost_layout import (
    CostSwitches,
    PricedSwitches,
    name_of,
    read_axes,
)
from planner.models.scheduling.layouts import Columns, Taken
from planner.plan import Plan, TokenStage
from planner.planning.compiler import DEFAULT_DEVICE
from planner.planning.plan_costs import PlanCosts
from planner.planning.pricing import COUNTED, Pricing
from planner.planning.selectors import SELECTORS, DecoderSelector, Learned, Product, Sizes
from planner.planning.selectors.in_decoder import BUDGET_FEATURES, MOST_COUNTS

# What says which tokens stay before layer 0: the vision side, by content alone or beginning with an
# even spread; or a selector. With ``all`` every token stays, and there is no vision side.
_LEARNED = ("learned", "spread")
SCORERS = (*_LEARNED, "uniform", "random", "divprune", "all")
# The share of a budget that should be used.
_ENOUGH = 0.99


@dataclass(frozen=True)
class UnifiedSwitches(PricedSwitches):
    """Image tokens, and some of layers, heads and MLP groups of the upper half.

    Its name is that of its axes, such as ``tokens,layers,heads,mlp``, with options as those of
    `CostSwitches`. ``:scorer=uniform`` has a rule (one of `SCORERS`) pick the tokens that the
    vision side counts, and with ``:scorer=spread`` what it learns begins with an even spread. An
    axis that is not named stays on, and so do all tokens with ``:scorer=all``.

    A decision is a row: the image tokens kept, then a flag per logit. Limits are in FLOPs, bytes or
    seconds above `always`, the cheapest that can run.
    """

    scorer: str = "learned"

    always_run: ClassVar[str] = "the layers that always run and the controller"

    @staticmethod
    def parse(text: str, graph: Graph) -> UnifiedSwitches:
        """Read ``tokens,layers,heads,mlp:groups=16,scorer=uniform``."""
        axes, numbers, words = read_axes(text, ("scorer",))
        scorer = words.get("scorer", "learned")
        check_known("scorer", scorer, SCORERS)
        if not graph.properties.get("image_tokens"):
            raise InputError(f"'{graph.name}' has no image tokens to choose from")
        rest = tuple(axis for axis in axes if axis != "tokens")
        return UnifiedSwitches(graph, rest, **numbers, scorer=scorer)

    @property
    @override
    def name(self) -> str:
        scorer = self.scorer if self.scorer != "learned" else None
        options = {"groups": self.groups, "first": self.first_layer, "scorer": scorer}
        return name_of(("tokens", *self.axes), options)

    @override
    def under(
        self,
        workload: Workload | None = None,
        stages: Sequence[TokenStage] = (),
        metric: str = "flops",
        device: str = DEFAULT_DEVICE,
    ) -> Self:
        if stages:
            raise InputError(f"{self.name} chooses image tokens itself: leave the selector out")
        return super().under(workload, (), metric, device)

    # -- token counts ------------------------------------------------------------------------

    @property
    def choices(self) -> int:
        """From how many token counts the vision side chooses."""
        most = min(int(self.graph.properties["image_tokens"]), MOST_COUNTS)
        return most if self.has_vision else 1

    @property
    def has_vision(self) -> bool:
        """Whether a vision side chooses tokens."""
        return self.scorer != "all"

    @property
    def learns_tokens(self) -> bool:
        """Whether the vision side says which tokens stay."""
        return self.scorer in _LEARNED

    @cached_property
    def load(self) -> Workload:
        """Of the prompts, without the latency token."""
        return self.workload or Workload.default(self.graph, new_tokens=0)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The token counts, ascending; the last is all image tokens."""
        of = self.load.image_tokens
        return tuple(-(-of * level // self.choices) for level in range(1, self.choices + 1))

    def stages_of(self, count: int) -> tuple[TokenStage, ...]:
        """The token stage that keeps so many image tokens; none where it keeps all."""
        of = self.load.image_tokens
        if count >= of:
            return ()
        kind = Learned if self.learns_tokens else SELECTORS[self.scorer]
        assert issubclass(kind, DecoderSelector)
        return (TokenStage(0, count, of, str(kind.at(0, count, of))),)

    @cached_property
    def _by_count(self) -> dict[int, CostSwitches]:
        load = replace(self.load, text_tokens=self.load.text_tokens + 1)
        own = self.graph, self.axes, self.groups, self.first_layer, self.metric, load
        return {n: CostSwitches(*own, self.stages_of(n), self.device) for n in self.counts}

    def at(self, option: int) -> CostSwitches:
        """The other switches, where the image tokens are so many: one of `counts`, by index."""
        return self._by_count[self.counts[option]]

    @property
    @override
    def inner(self) -> CostSwitches:
        return self.at(len(self.counts) - 1)

    @property
    @override
    def columns(self) -> dict[int, Columns]:
        return self.inner.columns

    # -- costs -------------------------------------------------------------------------------

    @cached_property
    @override
    def pricing(self) -> Pricing:
        return CostSwitches(self.graph, (), workload=self.load, device=self.device).pricing

    def overhead(self, count: int) -> tuple[Product, ...]:
        """Products of the controller that a plan's own price does not hold; see `Scheduler`."""
        width = int(self.graph.properties["hidden_size"])
        own: tuple[Product, ...] = (
            (1, width, BUDGET_FEATURES),
            (1, width, width),
            (1, self.size, width),
        )
        if not self.has_vision or (self.learns_tokens and self.stages_of(count)):
            return own
        sizes = Sizes(self.load.image_tokens, self.load.text_tokens, hidden=width)
        return own + Learned(count).products(0, sizes)

    @cached_property
    def _overheads(self) -> Tensor:
        row = list(COUNTED).index(self.metric)
        pricing = self.inner.pricing
        costs = {n: int(pricing.products(self.overhead(n))[row]) for n in set(self.counts)}
        return torch.tensor([costs[count] for count in self.counts])

    @cached_property
    def floors(self) -> Tensor:
        """Cost of what always runs, by token count; shape (counts,), int64."""
        found = [self.at(option).always for option in range(len(self.counts))]
        return torch.tensor(found) + self._overheads

    @cached_property
    def room(self) -> Tensor:
        """Cost of all switches, by token count; shape (counts,), int64."""
        return torch.tensor([self.at(option).steps for option in range(len(self.counts))])

    @cached_property
    def _grain(self) -> Tensor:
        """What all switches cost each, by token count, where whole layers are all there is.

        1 where there are finer ones, which fill a budget.
        """
        if self.axes != ("layers",):
            return torch.ones_like(self.room)
        return (self.room // self.size).clamp(min=1)

    @property
    @override
    def always(self) -> int:
        return int(self.floors.min())

    @property
    @override
    def steps(self) -> int:
        return int((self.floors + self.room).max()) - self.always

    def open_counts(self, limits: Tensor) -> Tensor:
        """Which token counts limits (batch,) leave open; shape (batch, counts), bool.

        Those that can use 99 % of a limit; where none can, those that can use most of it.
        """
        budgets = limits[:, None] + self.always
        floors, room, grain = (
            each.to(limits.device) for each in (self.floors, self.room, self._grain)
        )
        switched = torch.minimum(budgets - floors, room) // grain * grain
        used = torch.where(floors <= budgets, floors + switched, -1)
        enough = (_ENOUGH * budgets).floor().long()
        return used >= torch.minimum(used.amax(-1, keepdim=True), enough)

    def left(self, limits: Tensor, options: Tensor) -> Tensor:
        """What token counts (batch,), by index, leave of limits (batch,) for the switches."""
        floors = self.floors.to(limits.device)[options]
        return torch.minimum(limits + self.always - floors, self.room.to(limits.device)[options])

    # -- decisions ---------------------------------------------------------------------------

    @override
    def decide(self, logits: Tensor, limits: Tensor, options: Tensor | None = None) -> Taken:
        """Switches within what is `left` of limits (batch,), where token counts have been chosen.

        `options`: the counts by index, shape (batch,); None for all tokens.
        """
        if options is None:
            options = torch.full_like(limits, len(self.counts) - 1)
        rows = zip(logits[:, None], limits[:, None], options.tolist(), strict=True)
        return torch.cat([self.at(option).decide(*row) for *row, option in rows])

    @override
    def decision(self, taken: Taken, options: Tensor | None = None) -> Tensor:
        rows = super().decision(taken, None).long()
        counts = torch.tensor(self.counts)
        kept = counts[-1:].expand(len(rows)) if options is None else counts[options.cpu()]
        return torch.cat([kept[:, None], rows], 1)

    def _option(self, row: Tensor) -> int:
        return self.counts.index(int(row[0]))

    @override
    def spent(self, taken: Taken) -> int:
        option = self._option(taken)
        return int(self.floors[option]) - self.always + self.at(option).spent(taken[1:])

    @override
    def gates(self, taken: Taken) -> Gates:
        return self.inner.gates(taken)

    @override
    def plan(self, taken: Taken, base: Plan) -> Plan:
        return self.inner.plan(taken[1:], replace(base, tokens=self.stages_of(int(taken[0]))))

    @override
    def flops_fraction(
        self, row: Tensor, base: Plan, costs: PlanCosts, kept: Mapping[int, int] | None = None
    ) -> float:
        load = replace(costs.workload, text_tokens=costs.workload.text_tokens + 1)
        found = replace(costs, workload=load).of(self.plan(row, base), kept)["flops"]["plan"]
        own = self.inner.pricing.products(self.overhead(int(row[0])))[0]
        dense = costs.of(Plan.of(self.graph))["flops"]["base"]
        return (found + float(own)) / dense

    @override
    def example(self, limit: int, tokens: Sequence[TokenStage] = ()) -> Plan:
        """A plan at a limit: the most tokens that are open, then the lowest layers first."""
        limits = torch.tensor([limit])
        option = torch.tensor([int(self.open_counts(limits)[0].nonzero()[-1])])
        order = -torch.arange(self.size).float()[None]
        taken = self.decide(order, self.left(limits, option), option)
        row = self.decision(taken, option)[0]
        return self.plan(row, Plan.of(self.graph))

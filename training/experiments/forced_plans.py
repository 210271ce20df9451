"""Plans that take a controller's place on its weights: one for all questions, random, or tried."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from typing_extensions import override

from planner.ir.cost import Workload
from planner.ir.graph import Graph
from planner.models.scheduling import (
    CostSwitches,
    Scheduled,
    Scheduler,
    UnifiedSwitches,
)
from planner.models.scheduling.token_choice import ChosenTokens, best_tokens, picked
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.planning.budgets import Budget
from planner.solver import Infeasible
from planner.training import unified
from planner.training.adallava import AdaLlavaConfig, AdaptiveModel, Learner, last_answer
from planner.training.data import Conversation, Packer
from planner.training.estimators import GumbelSequential
from planner.training.policy import Reward, pictures_once
from planner.training.unified import UnifiedConfig

# Token counts that static plans are tried with, and plans tried for a question by the oracle.
_STATIC_COUNTS = 6
TRIED = 16
_BATCH = 32
_TEXT_TOKENS = 64

Batches = Sequence[Mapping[str, Tensor]]


def packed(processor: Any, questions: Sequence[Conversation]) -> Batches:
    """Questions with their answers, as inputs of a model."""
    packer = Packer(processor, _TEXT_TOKENS, dialogue_share=1.0)
    starts = range(0, len(questions), _BATCH)
    return [packer([questions[i] for i in range(len(questions))[s : s + _BATCH]]) for s in starts]


@dataclass(frozen=True, eq=False)
class Answered:
    """What came of questions, each under the plan that was decided for it."""

    loss: Tensor  # shape (questions,): mean over the answer's tokens, in nats
    # Shape (questions,): 1 where each of the answer's tokens is the likeliest one, so that greedy
    # decoding gives it, else 0.
    right: Tensor
    rows: Tensor  # shape (questions, 1 + size): the decisions

    def where(self, better: Tensor, other: Answered) -> Answered:
        """These where `better`, shape (questions,), else the others."""
        return Answered(
            torch.where(better, self.loss, other.loss),
            torch.where(better, self.right, other.right),
            torch.where(better[:, None], self.rows, other.rows),
        )


@dataclass(eq=False)
class Forced:
    """A model under its controller, whose decisions others may take."""

    scheduled: Scheduled  # the model, masking, not attached
    layout: UnifiedSwitches  # of the controller, for the questions' workload
    budget: Budget  # that plans keep to
    # What the model made of pictures; the same for all budgets.
    pictures: dict[Any, Any] = field(default_factory=dict)

    @property
    def on_grid(self) -> UnifiedSwitches:
        """The layout, where what stays of the image is a grid."""
        return replace(self.layout, scorer="uniform")

    def plan_all(self, row: Tensor) -> None:
        """Have every question run one decision, shape (1 + size,), on a grid of image tokens."""
        layout = self.on_grid
        option = layout.counts.index(int(row[0]))

        def tokens(scores: TokenScores, limits: Tensor, inputs: DecoderInputs) -> ChosenTokens:
            options = torch.full_like(limits, option)
            return ChosenTokens(options, picked(layout, scores.tokens, options, inputs))

        self.scheduled.decide_tokens = tokens
        self.scheduled.decide = lambda logits, _: row[1:].bool().expand_as(logits)

    def perturb(self, scale: float, generator: torch.Generator, own: float = 1.0) -> None:
        """Decide by the controller's scores, times `own`, plus normal noise."""
        layout = self.layout

        def noisy(values: Tensor) -> Tensor:
            return own * values + scale * torch.randn(values.shape, generator=generator)

        def tokens(scores: TokenScores, limits: Tensor, inputs: DecoderInputs) -> ChosenTokens:
            changed = replace(scores, counts=noisy(scores.counts), tokens=noisy(scores.tokens))
            return best_tokens(layout, changed, limits, inputs)

        def switches(logits: Tensor, limits: Tensor) -> Tensor:
            chosen = self.scheduled.chosen
            return layout.decide(noisy(logits), limits, None if chosen is None else chosen.options)

        self.scheduled.decide_tokens, self.scheduled.decide = tokens, switches

    def fix_switches(self, logits: Tensor) -> None:
        """Have the controller choose image tokens, and take switches by scores (size,) for all."""
        layout = self.layout

        def switches(own: Tensor, limits: Tensor) -> Tensor:
            chosen = self.scheduled.chosen
            options = None if chosen is None else chosen.options
            return layout.decide(logits.expand_as(own), limits, options)

        self.scheduled.decide = switches

    def fix_tokens(self) -> None:
        """Have the controller choose how many image tokens stay, on a grid, and the switches."""
        self.scheduled.decide_tokens = partial(best_tokens, self.on_grid)

    def controller(self) -> None:
        """Have the controller decide again."""
        self.scheduled.decide_tokens = self.scheduled.decide = None

    @torch.no_grad()
    def read(self, batches: Batches, **options: Any) -> Iterator[Any]:
        """The model's outputs, batch by batch; answers are read along with their questions.

        `options` are the model's. What was decided for a batch is in `scheduled` meanwhile.
        """
        limit = self.layout.limit(self.budget)
        self.scheduled.attach_limits(torch.tensor([limit]), layout=self.layout)
        try:
            for batch in batches:
                inputs = dict(batch)
                self.scheduled.at = last_answer(inputs.pop("labels"))
                with pictures_once(self.scheduled.model, self.pictures):
                    yield self.scheduled.model(**inputs, use_cache=False, **options)
        finally:
            self.scheduled.detach()
            self.scheduled.at = None

    def _passes(self, batches: Batches) -> Iterator[Answered]:
        for batch, output in zip(batches, self.read(batches), strict=True):
            labels, free = batch["labels"], torch.zeros(len(batch["labels"]))
            yield Answered(
                -Reward("nll").of(output.logits, labels, free),
                Reward("correct").of(output.logits, labels, free),
                self.scheduled.decisions.pop(),
            )

    def answers(self, batches: Batches) -> Answered:
        """What comes of questions."""
        parts = [(each.loss, each.right, each.rows) for each in self._passes(batches)]
        return Answered(*(torch.cat(part) for part in zip(*parts, strict=True)))

    def loss(self, batches: Batches) -> float:
        """Mean loss of questions, in nats."""
        return float(self.answers(batches).loss.mean())

    def mean_logits(self, batches: Batches) -> Tensor:
        """What the controller says of switches, on average; shape (size,)."""
        self.controller()
        found = []
        for _ in self._passes(batches):
            assert self.scheduled.logits is not None
            found.append(self.scheduled.logits)
        return torch.cat(found).mean(0)

    def worth(self, batches: Batches) -> Tensor:
        """What each switch's absence adds to the mean loss, everything else on; shape (size,)."""
        layout = self.layout
        # What is measured is the model; its token says that everything may be on.
        whole = replace(self, budget=Budget.of(1.0))
        dense = torch.ones(1 + layout.size, dtype=torch.long)
        dense[0] = layout.counts[-1]
        losses = []
        for switch in range(layout.size + 1):
            row = dense.clone()
            if switch:
                row[switch] = 0
            whole.plan_all(row)
            losses.append(whole.loss(batches))
        self.controller()
        return torch.tensor(losses[1:]) - losses[0]


def static_rows(forced: Forced, orders: Sequence[Tensor]) -> list[Tensor]:
    """Plans for all questions within the budget, each of shape (1 + size,).

    At some token counts, with switches by each of some scores (size,). A static plan has no
    controller, and may spend what one would cost.
    """
    layout = forced.on_grid
    plain = CostSwitches(layout.graph, layout.axes, layout.groups, layout.first_layer)
    fitting: list[tuple[int, CostSwitches, int]] = []
    for count in layout.counts:
        switches = plain.under(layout.load, layout.stages_of(count), layout.metric, layout.device)
        try:
            limit = switches.limit(forced.budget)
        except Infeasible:
            break
        if limit == switches.steps:
            # Fewer tokens leave more unused.
            fitting.clear()
        fitting.append((count, switches, limit))
    rows = []
    for pick in np.unique(np.linspace(0, len(fitting) - 1, _STATIC_COUNTS).round().astype(int)):
        count, switches, limit = fitting[pick]
        for scores in orders:
            taken = switches.decide(scores[None], torch.tensor([limit]))[0]
            rows.append(torch.cat([torch.tensor([count]), taken.long()]))
    return rows


def best_static(forced: Forced, batches: Batches, worth: Tensor) -> Tensor:
    """The plan that is best for all questions together, shape (1 + size,).

    Tried are `static_rows`, with switches by their `worth`, by the controller's mean logits, and by
    depth.
    """
    by_depth = -torch.arange(forced.layout.size).float()
    rows = static_rows(forced, [worth, forced.mean_logits(batches), by_depth])
    losses = []
    for row in rows:
        forced.plan_all(row)
        losses.append(forced.loss(batches))
    forced.controller()
    return rows[int(np.argmin(losses))]


def random_plan(forced: Forced, seed: int) -> None:
    """Have every question run a random plan of its own."""
    forced.perturb(1.0, torch.Generator().manual_seed(seed), own=0.0)


def best_of_tried(forced: Forced, batches: Batches, static: Tensor, seed: int) -> Answered:
    """The plans with the least loss of `TRIED`, question by question.

    Tried are the controller's plan, the best static one, half of the rest random, and half the
    controller's with noise.
    """
    generator = torch.Generator().manual_seed(seed)
    forced.controller()
    best = forced.answers(batches)
    for number in range(1, TRIED):
        if number == 1:
            forced.plan_all(static)
        else:
            forced.perturb(1.0, generator, own=float(number % 2))
        found = forced.answers(batches)
        best = found.where(found.loss < best.loss, best)
    forced.controller()
    return best


def begin_with(scheduler: Scheduler, row: Tensor) -> None:
    """Have an untrained controller decide about as one plan, shape (1 + size,), for all prompts.

    Its last layers say so by their biases alone, so that what depends on the prompt is learned.
    """
    layout = scheduler.layout
    assert isinstance(layout, UnifiedSwitches)
    assert scheduler.vision is not None
    assert scheduler.head is not None
    levels = torch.arange(len(layout.counts))
    distance = (levels - layout.counts.index(int(row[0]))).abs()
    for last, bias in (
        (scheduler.vision.count, -distance.float()),
        (scheduler.head, row[1:].float()),
    ):
        nn.init.zeros_(last.weight)
        with torch.no_grad():
            last.bias.copy_(bias)


def beginning_with(row: Tensor) -> Learner:
    """What trains a controller that begins with one plan."""

    def learner(
        config: AdaLlavaConfig,
        model: nn.Module,
        graph: Graph,
        scheduler: Scheduler,
        load: Workload | None,
    ) -> AdaptiveModel:
        assert isinstance(config, UnifiedConfig)
        begin_with(scheduler, row)
        return unified.learner(config, model, graph, scheduler, load)

    return learner


class OnePlan(AdaptiveModel):
    """Trains a model under one plan for all prompts, told one limit; its scheduler stands by."""

    limit = 0

    @override
    def forward(self, labels: Tensor, limits: Tensor, seeds: Tensor, **inputs: Any) -> Any:
        return super().forward(labels, torch.full_like(limits, self.limit), seeds, **inputs)


def under_one_plan(row: Tensor, budget: Budget) -> Learner:
    """What trains a model for one decision, shape (1 + size,)."""

    def learner(
        config: AdaLlavaConfig,
        model: nn.Module,
        graph: Graph,
        scheduler: Scheduler,
        load: Workload | None,
    ) -> OnePlan:
        adaptive = OnePlan(model, graph, scheduler, GumbelSequential(), load)
        layout = adaptive.layout
        assert isinstance(layout, UnifiedSwitches)
        adaptive.limit = layout.limit(budget)
        Forced(adaptive.scheduled, layout, budget).plan_all(row)
        return adaptive

    return learner

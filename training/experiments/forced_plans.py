"""Plans that take a controller's place on its weights: one for all questions, random, or tried."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from planner.models.scheduling import Scheduled, UnifiedSwitches
from planner.models.scheduling.token_choice import ChosenTokens, best_tokens, picked
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.training.adallava import last_answer
from planner.training.data import Conversation, Packer
from planner.training.policy import Reward

# Token counts that static plans are tried with, and plans tried for a question by the oracle.
_STATIC_COUNTS = 6
TRIED = 16
_BATCH = 32
_TEXT_TOKENS = 64


@dataclass(eq=False)
class Forced:
    """A model under its controller, whose decisions others may take.

    Attributes:
        scheduled: the model, masking, not attached.
        processor: of the model.
        layout: of the controller, for the questions' workload.
        limit: that plans keep to.
    """

    scheduled: Scheduled
    processor: Any
    layout: UnifiedSwitches
    limit: int

    def plan_all(self, row: Tensor) -> None:
        """Have every question run one decision, shape (1 + size,), on a grid of image tokens."""
        layout = replace(self.layout, scorer="uniform")
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

    def controller(self) -> None:
        """Have the controller decide again."""
        self.scheduled.decide_tokens = self.scheduled.decide = None

    @torch.no_grad()
    def answers(self, questions: Sequence[Conversation]) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(loss in nats, 1 where right, decision) of questions, batch by batch.

        Known answers are read along: an answer is right if each of its tokens is the likeliest.
        """
        packer = Packer(self.processor, _TEXT_TOKENS, dialogue_share=1.0)
        self.scheduled.attach_limits(torch.tensor([self.limit]), layout=self.layout)
        try:
            for start in range(0, len(questions), _BATCH):
                some = [questions[i] for i in range(start, min(start + _BATCH, len(questions)))]
                batch = packer(some)
                labels = batch.pop("labels")
                self.scheduled.at = last_answer(labels)
                logits = self.scheduled.model(**batch, use_cache=False).logits
                free = torch.zeros(len(some))
                yield (
                    -Reward("nll").of(logits, labels, free),
                    Reward("correct").of(logits, labels, free),
                    self.scheduled.decisions.pop(),
                )
        finally:
            self.scheduled.detach()
            self.scheduled.at = None

    def loss(self, questions: Sequence[Conversation]) -> float:
        """Mean loss of questions, in nats."""
        return float(torch.cat([loss for loss, _, _ in self.answers(questions)]).mean())


def best_static(forced: Forced, questions: Sequence[Conversation]) -> Tensor:
    """The plan that is best for all questions together, shape (1 + size,).

    Tried are token counts that the limit leaves open, each with switches by what leaving one out
    costs these questions, by the controller's mean logits, and by depth.
    """
    layout = forced.layout
    forced.controller()
    logits = [_mean_logits(forced, questions), _worth(forced, questions)]
    logits.append(-torch.arange(layout.size).float())
    opened = layout.open_counts(torch.tensor([forced.limit]))[0].nonzero().flatten()
    picks = np.linspace(0, len(opened) - 1, _STATIC_COUNTS).round().astype(int)
    rows = []
    for option in opened[np.unique(picks)]:
        options = option[None]
        left = layout.left(torch.tensor([forced.limit]), options)
        for scores in logits:
            taken = layout.decide(scores[None], left, options)
            rows.append(layout.decision(taken, options)[0])
    losses = []
    for row in rows:
        forced.plan_all(row)
        losses.append(forced.loss(questions))
    forced.controller()
    return rows[int(np.argmin(losses))]


def _mean_logits(forced: Forced, questions: Sequence[Conversation]) -> Tensor:
    found = []
    for _ in forced.answers(questions):
        assert forced.scheduled.logits is not None
        found.append(forced.scheduled.logits)
    return torch.cat(found).mean(0)


def _worth(forced: Forced, questions: Sequence[Conversation]) -> Tensor:
    """What each switch's absence adds to the mean loss, everything else on; shape (size,)."""
    layout = forced.layout
    # Beyond the budget: what is measured is the model.
    whole = replace(forced, limit=layout.steps)
    dense = torch.ones(1 + layout.size, dtype=torch.long)
    dense[0] = layout.counts[-1]
    few = [questions[index] for index in range(min(_BATCH, len(questions)))]
    losses = []
    for switch in (0, *range(1, layout.size + 1)):
        row = dense.clone()
        if switch:
            row[switch] = 0
        whole.plan_all(row)
        losses.append(whole.loss(few))
    forced.controller()
    return torch.tensor(losses[1:]) - losses[0]


def random_plan(forced: Forced, seed: int) -> None:
    """Have every question run a random plan of its own."""
    forced.perturb(1.0, torch.Generator().manual_seed(seed), own=0.0)


def best_of_tried(
    forced: Forced, questions: Sequence[Conversation], static: Tensor, seed: int
) -> tuple[npt.NDArray[np.float64], Tensor]:
    """(1 where right, decisions) of the plans with the least loss of `TRIED`, question by question.

    Tried are the controller's plan, the best static one, half of the rest random, and half the
    controller's with noise.
    """
    generator = torch.Generator().manual_seed(seed)
    best = torch.full((len(questions),), torch.inf)
    right = torch.zeros(len(questions))
    rows = torch.zeros(len(questions), 1 + forced.layout.size, dtype=torch.long)
    for number in range(TRIED):
        if number == 0:
            forced.controller()
        elif number == 1:
            forced.plan_all(static)
        else:
            forced.perturb(1.0, generator, own=float(number % 2))
        parts = list(forced.answers(questions))
        loss, hits, decisions = (torch.cat(part) for part in zip(*parts, strict=True))
        better = loss < best
        best[better], right[better], rows[better] = loss[better], hits[better], decisions[better]
    forced.controller()
    return right.double().numpy(), rows

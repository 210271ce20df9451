"""Image tokens drawn for training, as switches are: how many, which, and a gradient for both.

How many tokens stay decides what is left for the switches. That has a gradient too, by what the
counts leave on average: a switch that is on counts as so much of the budget.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.models.scheduling import UnifiedSwitches
from planner.models.scheduling.token_choice import ChosenTokens, kept_counts, picked
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs
from planner.training.estimators import Estimator, straight_through
from planner.training.switch_costs import NEVER, AdditiveCosts


def token_costs(image: Tensor) -> AdditiveCosts:
    """An image token costs 1, and text cannot be drawn; of image (batch, tokens), bool."""
    return AdditiveCosts(torch.where(image, 1, NEVER))


@dataclass(frozen=True, eq=False)
class DrawnTokens:
    """Sampled image tokens."""

    chosen: ChosenTokens  # what is kept; its gates have a gradient
    # Shape (batch,), 1 in value: what the counts leave for the switches, in proportion to what the
    # drawn one leaves.
    allowance: Tensor


def draw_tokens(
    layout: UnifiedSwitches,
    scores: TokenScores,
    limits: Tensor,
    inputs: DecoderInputs,
    estimator: Estimator,
    noise: Sequence[torch.Generator],
) -> DrawnTokens:
    """Draw a token count by an estimator's noise, and so many tokens by it.

    Args:
        limits: shape (batch,), above what always runs.
        estimator: draws the count, and tokens where they are not picked by a rule.
        noise: one generator for every sample.
    """
    image = scores.image
    open_counts = layout.open_counts(limits)
    logits = scores.counts.masked_fill(~open_counts, -torch.inf)
    options = estimator.noisy(logits.detach(), noise).argmax(-1)
    shares = logits.softmax(-1)
    counts = kept_counts(layout, options, image)
    if layout.learns_tokens:
        drawn = estimator.draw(scores.tokens, token_costs(image), counts, noise)
        gates = torch.where(image, drawn.gates, 1)
    else:
        gates = picked(layout, scores.tokens, options, inputs).to(scores.tokens)
    # By how many counts a token stays: those drawn with all, then by score.
    ranks = (scores.tokens + 1e6 * gates).detach().masked_fill(~image, -torch.inf)
    ranks = ranks.argsort(-1, descending=True).argsort(-1)
    every = torch.arange(len(layout.counts), device=image.device).expand(len(image), -1)
    kept = torch.stack([kept_counts(layout, each, image) for each in every.unbind(1)], 1)
    stays = (shares[:, :, None] * (ranks[:, None] < kept[:, :, None])).sum(1)
    gates = straight_through(gates, torch.where(image, stays, 0)) + (gates - gates.detach())
    if gates.requires_grad:
        # Beside the tokens that stay, attention to one that was dropped may be beyond all bounds.
        gates.register_hook(lambda gradient: gradient.clamp(-1, 1))
    left = torch.stack([layout.left(limits, each) for each in every.unbind(1)], 1)
    mean = (shares * left.where(open_counts, 0)).sum(-1)
    own = layout.left(limits, options).clamp(min=1)
    allowance = straight_through(torch.ones_like(mean), mean / own)
    return DrawnTokens(ChosenTokens(options, gates), allowance)

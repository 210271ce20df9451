"""How many image tokens a prompt keeps under its budget, and which."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from planner.kernels.ops.choose_tokens import top_mask
from planner.models.scheduling.unified_layout import UnifiedSwitches
from planner.models.scheduling.vision_controller import TokenScores
from planner.models.tokens.selectors import DecoderInputs, select_tokens
from planner.planning.selectors import DecoderSelector, selector_of


@dataclass(frozen=True, eq=False)
class ChosenTokens:
    """What the vision side decided for a batch of prompts."""

    options: Tensor  # shape (batch,), int64: one of the layout's token counts, by index
    keep: Tensor  # shape (batch, tokens): bool, or 0 and 1 with a gradient; text stays


# Scores, limits (batch,) above what always runs, and the prompt to what is kept.
DecideTokens = Callable[[TokenScores, Tensor, DecoderInputs], ChosenTokens]


def kept_counts(layout: UnifiedSwitches, options: Tensor, image: Tensor) -> Tensor:
    """Image tokens to keep, shape (batch,), of those there are in image (batch, tokens).

    A prompt with fewer than the layout is priced for keeps the same share of them, rounded down.
    """
    counts = torch.tensor(layout.counts, device=image.device)[options]
    return image.sum(1) * counts // max(1, layout.load.image_tokens)


def best_tokens(
    layout: UnifiedSwitches, scores: TokenScores, limits: Tensor, inputs: DecoderInputs
) -> ChosenTokens:
    """The best-scored of the token counts that limits leave open, and the best-scored tokens.

    Tokens are picked by the layout's scorer.
    """
    closed = ~layout.open_counts(limits)
    options = scores.counts.masked_fill(closed, -torch.inf).argmax(-1)
    return ChosenTokens(options, picked(layout, scores.tokens, options, inputs))


def picked(
    layout: UnifiedSwitches, scores: Tensor, options: Tensor, inputs: DecoderInputs
) -> Tensor:
    """The image tokens that the layout's scorer keeps, and all text; (batch, tokens), bool."""
    image, states = inputs.image, inputs.hidden_states
    if layout.learns_tokens:
        return ~image | top_mask(scores, image, kept_counts(layout, options, image))
    keep = torch.ones_like(image)
    for option in options.unique().tolist():
        rows = (options == option).nonzero()[:, 0]
        for stage in layout.stages_of(layout.counts[option]):
            assert states is not None
            some = DecoderInputs(image[rows], inputs.valid[rows], hidden_states=states[rows])
            selector = selector_of(stage)
            assert isinstance(selector, DecoderSelector)
            keep[rows] = select_tokens(selector, some, 0).keep
    return keep

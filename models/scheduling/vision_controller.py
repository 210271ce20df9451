"""The vision side of a unified controller: which image tokens matter, and how many to keep.

It sees a prompt's embeddings before the decoder does, and the budget.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu

from planner.models.scheduling.budget_features import sinusoid
from planner.planning.selectors import Learned
from planner.planning.selectors.in_decoder import BUDGET_FEATURES

# Where tokens begin spread evenly: how far the last one's score lies below the first one's, and the
# weight of words that match, which is 1 elsewhere.
_SPREAD, _FIRST_MATCH = 2.0, 0.1


@dataclass(frozen=True, eq=False)
class TokenScores:
    """What the vision side says of a batch of prompts."""

    counts: Tensor  # shape (batch, counts), float32: a logit per token count
    tokens: Tensor  # shape (batch, tokens), float32: a score per token; it means nothing for text
    image: Tensor  # shape (batch, tokens), bool: which are image tokens
    summary: Tensor  # shape (batch, 2 width): what counts are scored by


class VisionSide(nn.Module):
    """Scores image tokens by their content, by the words of the prompt and by the budget.

    A token's features are a linear map of its embedding, normalised. Its score adds what a small
    MLP makes of them with the budget, and how well the best words match them (log-sum-exp of scaled
    dot products). Counts are scored from the mean features of image and words, with the budget.

    Args:
        hidden: width of embeddings.
        counts: how many token counts there are.
        width: of features.
        spread: begin with tokens spread evenly over the image, and learn what content adds to that.
    """

    def __init__(
        self, hidden: int, counts: int, width: int = Learned.width, *, spread: bool = False
    ) -> None:
        super().__init__()
        self.counts, self.summary = counts, 2 * width
        self.features = nn.Linear(hidden, width)
        self.norm = nn.LayerNorm(width)
        self.budget = nn.Linear(BUDGET_FEATURES, width)
        self.score = nn.Linear(width, 1)
        self.match = nn.Parameter(torch.ones(width))
        self.count = nn.Linear(self.summary, counts)
        self.spread = None
        if spread:
            self.spread = nn.Parameter(torch.tensor(_SPREAD))
            nn.init.zeros_(self.score.weight)
            nn.init.constant_(self.match, _FIRST_MATCH)

    def forward(self, embeds: Tensor, image: Tensor, words: Tensor, share: Tensor) -> TokenScores:
        """Scores of prompts.

        Args:
            embeds: shape (batch, tokens, hidden).
            image: shape (batch, tokens), bool: image tokens.
            words: shape (batch, tokens), bool: the prompt's other tokens.
            share: shape (batch,): of everything that may be switched, what the budget allows.
        """
        weight = self.features.weight
        features = self.norm(self.features(embeds.to(weight.dtype)))
        told = self.budget(sinusoid(share * self.counts, self.counts).to(weight.dtype))
        own = self.score(gelu(features + told[:, None]))[..., 0]
        dots = (features * self.match) @ features.mT / math.sqrt(features.shape[-1])
        if self.spread is not None:
            own = own - self.spread * spread_order(image).to(own.dtype)
        none = ~words.any(-1, keepdim=True)
        matched = dots.masked_fill(~(words | none)[:, None], -torch.inf).logsumexp(-1)
        means = [gelu(_mean(features, which) + told) for which in (image, words)]
        summary = torch.cat(means, -1)
        return TokenScores(self.count(summary).float(), (own + matched).float(), image, summary)


def spread_order(image: Tensor) -> Tensor:
    """When each image token comes, of an order that spreads any first few evenly; from 0 to 1.

    The order is that of the numbers whose bits are the token's, turned round (van der Corput's).

    Args:
        image: which are image tokens, shape (batch, tokens), bool.

    Returns shape (batch, tokens), float32; it means nothing for text.
    """
    number = (image.long().cumsum(-1) - 1).clamp(min=0)
    order = torch.zeros_like(image, dtype=torch.float32)
    weight = 0.5
    for bit in range(int(number.max()).bit_length() if number.numel() else 0):
        order += weight * (number >> bit & 1)
        weight /= 2
    return order


def _mean(features: Tensor, which: Tensor) -> Tensor:
    """Over some tokens, shape (batch, width); 0 over none."""
    weights = which.to(features.dtype)
    total = (weights[:, None] @ features)[:, 0]
    return total / weights.sum(-1, keepdim=True).clamp(min=1)

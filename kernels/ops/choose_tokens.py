"""The best tokens of each sample, exactly as many as asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.op import Op


def top_mask(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """Mark the best eligible entries of each row, (..., n) bool; of equal ones the first win.

    Args:
        scores: (..., n).
        eligible: (..., n) bool.
        counts: (...): how many to mark in each row; all eligible ones where there are fewer.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    # Sorting twice, rather than masking scores with -inf, is right for scores of -inf as well.
    ahead = eligible.gather(-1, order).to(torch.uint8)
    order = order.gather(-1, ahead.sort(dim=-1, descending=True, stable=True).indices)
    rank = torch.empty_like(order)
    rank.scatter_(-1, order, torch.arange(order.shape[-1], device=order.device).expand_as(order))
    return (rank < counts[..., None]) & eligible


@dataclass(frozen=True, eq=False)
class ChooseTokens(Op, name="choose_tokens"):
    """Marks the best eligible tokens of each sample: (batch, tokens) bool."""

    scores: Tensor  # (batch, tokens); of equal ones the earlier token wins
    eligible: Tensor  # (batch, tokens) bool
    counts: Tensor  # (batch,): how many to mark; all eligible ones where there are fewer

    @override
    def twin(self) -> Tensor:
        chosen = torch.zeros_like(self.eligible)
        for row, count in enumerate(self.counts.tolist()):
            candidates = self.eligible[row].nonzero().flatten()
            order = self.scores[row, candidates].argsort(descending=True, stable=True)
            chosen[row, candidates[order[:count]]] = True
        return chosen

    @override
    def by_pytorch(self) -> Tensor:
        return top_mask(self.scores, self.eligible, self.counts)

    @override
    def empty(self) -> Tensor:
        return torch.empty_like(self.eligible)

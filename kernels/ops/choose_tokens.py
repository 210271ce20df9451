"""The best tokens of each sample, exactly as many as asked for."""

from __future__ import annotations

import torch
from torch import Tensor

from planner.kernels.ops.registration import Op

__all__ = ["choose_tokens", "naive_choose_tokens", "op"]


def choose_tokens(scores: Tensor, eligible: Tensor, counts: Tensor, *, triton: bool) -> Tensor:
    """Mark the eligible tokens of the highest scores; of equal ones the earlier token wins.

    Args:
        scores: (batch, tokens).
        eligible: (batch, tokens) bool.
        counts: (batch,): how many to mark; all eligible ones where there are fewer.
        triton: whether Triton computes it, or PyTorch.

    Returns:
        (batch, tokens) bool.
    """
    return op(scores, eligible, counts, triton=triton)


def naive_choose_tokens(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    """The twin: a stable sort of each sample's eligible tokens."""
    chosen = torch.zeros_like(eligible)
    for row, count in enumerate(counts.tolist()):
        candidates = eligible[row].nonzero().flatten()
        order = scores[row, candidates].argsort(descending=True, stable=True)
        chosen[row, candidates[order[:count]]] = True
    return chosen


def _ranked(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    order = scores.argsort(dim=-1, descending=True, stable=True)
    # Sorting twice, rather than masking scores with -inf, is right for scores of -inf as well.
    first = eligible.gather(-1, order).to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    rank = order.gather(-1, first).argsort(dim=-1)
    return (rank < counts[:, None]) & eligible


def _forward(scores: Tensor, eligible: Tensor, counts: Tensor, triton: bool) -> Tensor:
    if not triton:
        return _ranked(scores, eligible, counts)
    from planner.kernels.triton.choose_tokens import choose_tokens as kernel

    return kernel(scores, eligible, counts)


def _fake(scores: Tensor, eligible: Tensor, counts: Tensor) -> Tensor:
    return torch.empty_like(eligible)


op = Op(
    "choose_tokens",
    "Tensor scores, Tensor eligible, Tensor counts",
    forward=_forward,
    fake=_fake,
    survivors=False,
)

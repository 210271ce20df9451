"""From scores to choices: best-k per row, outliers, and packing of ragged choices.

Ties always go to the lower index, so a sample gets the same tokens alone and in any batch.
"""

from __future__ import annotations

import torch
from torch import Tensor


def descending(scores: Tensor) -> Tensor:
    """Indices of the last dimension from the highest score to the lowest, ties by index."""
    return scores.sort(dim=-1, descending=True, stable=True).indices


def outliers(scores: Tensor) -> Tensor:
    """Mark entries above the upper fence Q3 + 1.5 (Q3 - Q1) of their own row.

    Quartiles interpolate linearly between order statistics (Tukey's fences as in numpy.percentile).
    Shape (rows, n) to the same, bool.
    """
    levels = scores.new_tensor([0.25, 0.75])
    lower, upper = scores.quantile(levels, dim=-1, keepdim=True).unbind()
    return scores > upper + 1.5 * (upper - lower)


def pack(keep: Tensor, side: str) -> tuple[Tensor, Tensor]:
    """Gather indices that move the kept entries of each row together, in their order.

    Args:
        keep: shape (..., n), bool.
        side: ``left`` or ``right``: where rows with fewer kept entries are padded.

    Returns:
        Source positions, shape (..., longest), int64, where padding holds some dropped position;
        and which are no padding, bool.
    """
    longest = int(keep.sum(-1).max())
    flags = keep.to(torch.uint8)
    if side == "left":
        index = flags.sort(dim=-1, stable=True).indices[..., keep.shape[-1] - longest :]
    else:
        index = descending(flags)[..., :longest]
    return index, keep.gather(-1, index)

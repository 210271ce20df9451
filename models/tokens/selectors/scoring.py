"""The rows of attention that selectors score with, and from scores to choices.

No selector needs a whole attention matrix, so the model keeps its fused kernels (SDPA, flash).
Ties always go to the lower index, so a sample gets the same tokens alone and in any batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ScoreRule:
    """What an attention block makes of q k^T before and in its softmax."""

    scaling: float | None = None  # factor on q k^T; None is 1/sqrt(head_dim)
    softcap: float | None = None  # bound on a score: softcap tanh(score / softcap)
    # (heads,): score of a key beyond all others, to which a part of the attention goes (gpt-oss)
    sinks: Tensor | None = None


PLAIN = ScoreRule()


def visible_keys(rows: Tensor, valid: Tensor, attention_mask: Tensor | None, seq: int) -> Tensor:
    """Which keys given query rows may see; shape (batch, n, keys), bool.

    Args:
        rows: shape (batch, n), int64: positions among the `seq` tokens being processed.
        valid: shape (batch, keys), bool: False for padding.
        attention_mask: shape (batch or 1, 1, seq, keys), bool or additive; None is causal.
        seq: tokens being processed; the keys before them come from a cache.
    """
    batch, keys = valid.shape
    if attention_mask is None:
        positions = torch.arange(keys, device=valid.device)
        seen = positions <= rows[..., None] + (keys - seq)
    else:
        mask = attention_mask.expand(batch, -1, -1, -1)[:, 0, :, :keys]
        seen = mask.gather(1, rows[..., None].expand(-1, -1, keys))
        if seen.dtype != torch.bool:
            seen = seen > torch.finfo(seen.dtype).min / 2
    return seen & valid[:, None]


def attention_rows(query: Tensor, key: Tensor, visible: Tensor, rule: ScoreRule = PLAIN) -> Tensor:
    """Softmax attention of some query rows to all keys: (batch, heads, rows, keys), 32 bits or up.

    Args:
        query: shape (batch, heads, rows, head_dim).
        key: shape (batch, kv_heads, keys, head_dim); query head h reads h // (heads / kv_heads).
        visible: shape (batch, rows, keys), bool; a row that sees nothing gets zeros.
        rule: how scores are made.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).reshape(batch, kv_heads, -1, head_dim)
    logits = grouped @ key.to(dtype).mT * (head_dim**-0.5 if rule.scaling is None else rule.scaling)
    logits = logits.view(batch, heads, rows, keys)
    if rule.softcap is not None:
        logits = (logits / rule.softcap).tanh() * rule.softcap
    hidden = ~visible[:, None]
    # The lowest finite value, not -inf: a row without any visible key must not become NaN.
    logits = logits.masked_fill(hidden, torch.finfo(dtype).min)
    if rule.sinks is not None:
        sinks = rule.sinks.to(dtype)[None, :, None, None].expand(batch, -1, rows, 1)
        logits = torch.cat([logits, sinks], -1)
    return logits.softmax(-1)[..., :keys].masked_fill(hidden, 0)


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

    `keep`: shape (..., n), bool. `side`: ``left`` or ``right``: where rows with fewer kept entries
    are padded. Returns source positions, shape (..., longest), int64, where padding holds some
    dropped position; and which are no padding, bool.
    """
    longest = int(keep.sum(-1).max())
    flags = keep.to(torch.uint8)
    if side == "left":
        index = flags.sort(dim=-1, stable=True).indices[..., keep.shape[-1] - longest :]
    else:
        index = descending(flags)[..., :longest]
    return index, keep.gather(-1, index)

"""The rows of attention that selectors score with, computed from queries and keys alone.

No selector needs a whole attention matrix, so the model keeps its fused kernels (SDPA, flash): a
few query rows against all keys cost what those rows cost and nothing is written back.
"""

from __future__ import annotations

import torch
from torch import Tensor


def cls_attention(query: Tensor, key: Tensor, heads: int) -> Tensor:
    """Attention of the CLS token to every patch, CLS itself left out after the softmax.

    Args:
        query: shape (runs, width): the CLS token's projected query, before any scaling.
        key: shape (runs, 1 + patches, width): projected keys, CLS token first.
        heads: into how many heads the width is divided; 1 takes it as one wide head, with the
            scale 1/sqrt(width) (LLaVA-PruMerge does).

    Returns:
        Shape (runs, heads, patches), float32 or wider; rows sum to less than one.
    """
    runs, width = query.shape
    dtype = torch.promote_types(query.dtype, torch.float32)
    query = query.to(dtype).view(runs, heads, 1, width // heads)
    key = key.to(dtype).view(runs, -1, heads, width // heads).transpose(1, 2)
    logits: Tensor = query @ key.mT * (width // heads) ** -0.5
    return logits.softmax(-1)[:, :, 0, 1:]


def visible_keys(rows: Tensor, valid: Tensor, attention_mask: Tensor | None, seq: int) -> Tensor:
    """Which keys given query rows may see.

    Args:
        rows: shape (batch, n), int64: positions among the `seq` tokens being processed.
        valid: shape (batch, keys), bool: False for padding.
        attention_mask: shape (batch or 1, 1, seq, keys), bool or additive; None is causal.
        seq: tokens being processed; the keys before them come from a cache.

    Returns:
        Shape (batch, n, keys), bool.
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


def attention_rows(
    query: Tensor, key: Tensor, visible: Tensor, scaling: float | None = None
) -> Tensor:
    """Softmax attention of some query rows to all keys.

    Args:
        query: shape (batch, heads, rows, head_dim).
        key: shape (batch, kv_heads, keys, head_dim); heads is a multiple of kv_heads, and
            query head h reads KV head h // (heads / kv_heads).
        visible: shape (batch, rows, keys), bool; a row that sees nothing gets zeros.
        scaling: factor on the logits; None is 1/sqrt(head_dim).

    Returns:
        Shape (batch, heads, rows, keys), float32 or wider.
    """
    batch, heads, rows, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(dtype).reshape(batch, kv_heads, -1, head_dim)
    logits = grouped @ key.to(dtype).mT * (head_dim**-0.5 if scaling is None else scaling)
    logits = logits.view(batch, heads, rows, keys)
    hidden = ~visible[:, None]
    # The lowest finite value, not -inf: a row without any visible key must not become NaN.
    logits = logits.masked_fill(hidden, torch.finfo(dtype).min)
    return logits.softmax(-1).masked_fill(hidden, 0)

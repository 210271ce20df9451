"""What attention one query pays every key: how FastV and its like rank tokens.

That needs one row of the attention matrix, which is computed here from the query and the cached
keys, whatever computed the layer itself. Source: Chen et al., arXiv 2403.06764, section 4.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from planner.kernels.ops.registration import Op

__all__ = ["naive_score_tokens", "op", "score_tokens"]


def score_tokens(
    query: Tensor, key: Tensor, visible: Tensor, *, scale: float, triton: bool
) -> Tensor:
    """Attention of one query per sample, averaged over heads.

    Args:
        query: (batch, heads, 1, head_dim), rotated.
        key: (batch, kv_heads, keys, head_dim), heads a multiple of kv_heads.
        visible: (batch, keys) bool: keys that the query sees; the others score 0.
        scale: factor on q k^T.
        triton: whether Triton computes it, or PyTorch.

    Returns:
        (batch, keys), float32 or wider.
    """
    return op(query, key, visible, scale, triton=triton)


def naive_score_tokens(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    """The twin: all heads of all samples, keys repeated for the queries that share them."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    shared = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(shared, dim=1).to(dtype)
    scores = (query.to(dtype) @ key.mT * scale).masked_fill(~visible[:, None, None], -torch.inf)
    return torch.softmax(scores, dim=-1).nan_to_num(0.0)[:, :, 0].mean(dim=1)


def _forward(query: Tensor, key: Tensor, visible: Tensor, scale: float, triton: bool) -> Tensor:
    if not triton:
        return naive_score_tokens(query, key, visible, scale)
    from planner.kernels.triton.score_tokens import score_tokens as kernel

    return kernel(query, key, visible, scale)


def _fake(query: Tensor, key: Tensor, visible: Tensor, scale: float) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(visible.shape, dtype=dtype)


op = Op(
    "score_tokens",
    "Tensor query, Tensor key, Tensor visible, float scale",
    forward=_forward,
    fake=_fake,
    survivors=False,
)

"""What attention one query pays every key: how FastV and its like rank tokens.

Source: Chen et al., arXiv 2403.06764, section 4.1.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from typing_extensions import override

from planner.kernels.ops.op import Op


@dataclass(frozen=True, eq=False)
class ScoreTokens(Op, name="score_tokens"):
    """Attention of one query per sample, averaged over heads: (batch, keys), float32 or wider."""

    query: Tensor  # (batch, heads, 1, head_dim), rotated
    key: Tensor  # (batch, kv_heads, keys, head_dim), heads a multiple of kv_heads
    visible: Tensor  # (batch, keys) bool: keys that the query sees; the others score 0
    scale: float  # factor on q k^T

    @override
    def twin(self) -> Tensor:
        key = self.key.repeat_interleave(self.query.shape[1] // self.key.shape[1], dim=1)
        scores = self.query @ key.mT * self.scale
        scores = scores.masked_fill(~self.visible[:, None, None], -torch.inf)
        return torch.softmax(scores, dim=-1).nan_to_num(0.0)[:, :, 0].mean(dim=1)

    @override
    def by_pytorch(self) -> Tensor:
        (batch, heads, _, head_dim), (kv_heads, keys) = self.query.shape, self.key.shape[1:3]
        dtype = self.empty().dtype
        grouped = self.query.to(dtype).reshape(batch, kv_heads, -1, head_dim)
        scores = (grouped @ self.key.to(dtype).mT * self.scale).view(batch, heads, keys)
        hidden = ~self.visible[:, None]
        # The lowest finite value, not -inf: a row without any visible key must not become NaN.
        scores = scores.masked_fill(hidden, torch.finfo(dtype).min)
        return scores.softmax(-1).masked_fill(hidden, 0).mean(dim=1)

    @override
    def empty(self) -> Tensor:
        dtype = torch.promote_types(self.query.dtype, torch.float32)
        return self.query.new_empty(self.visible.shape, dtype=dtype)

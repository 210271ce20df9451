"""H2O: a KV cache that keeps heavy hitters and the most recent tokens, head by head."""

from __future__ import annotations

import torch
from torch import Tensor

from planner.kernels.ops.choose_tokens import top_mask
from planner.models.tokens.selectors.scoring import (
    PLAIN,
    ScoreRule,
    attention_rows,
    pack,
    visible_keys,
)
from planner.planning.selectors import H2O


def attention_received(
    query: Tensor,
    key: Tensor,
    valid: Tensor,
    attention_mask: Tensor | None = None,
    rule: ScoreRule = PLAIN,
    rows_at_once: int = 256,
) -> Tensor:
    """Attention that keys receive from all given queries: (batch, kv_heads, keys).

    Works on a few hundred query rows at a time, so a long prompt never needs a whole attention
    matrix. Padded queries give nothing, padded keys receive nothing.

    Args:
        query: shape (batch, heads, seq, head_dim): the new tokens, the last `seq` of the keys.
        key: shape (batch, kv_heads, keys, head_dim).
        valid: shape (batch, keys), bool.
        attention_mask: see `visible_keys`.
        rule: see `attention_rows`.
        rows_at_once: query rows in memory at once.
    """
    batch, heads, seq, _ = query.shape
    kv_heads, keys = key.shape[1:3]
    dtype = torch.promote_types(query.dtype, torch.float32)
    received = torch.zeros(batch, heads, keys, dtype=dtype, device=key.device)
    for start in range(0, seq, rows_at_once):
        stop = min(start + rows_at_once, seq)
        rows = torch.arange(start, stop, device=key.device).expand(batch, -1)
        visible = visible_keys(rows, valid, attention_mask, seq)
        visible = visible & valid[:, keys - seq + start : keys - seq + stop, None]
        received += attention_rows(query[:, :, start:stop], key, visible, rule).sum(2)
    return received.view(batch, kv_heads, -1, keys).sum(2)


def heavy_and_recent(scores: Tensor, valid: Tensor, heavy: Tensor, recent: Tensor) -> Tensor:
    """Mark the `recent` last entries of each head's cache and the `heavy` best of the others.

    `scores` and the result have shape (batch, kv_heads, keys), `valid` (batch, keys), `heavy` and
    `recent` (batch,). Every head of a sample has equally many.
    """
    age = valid.flip(-1).cumsum(-1).flip(-1)  # 1 for the newest token
    newest = (valid & (age <= recent[:, None]))[:, None]
    older = (valid[:, None] & ~newest).expand_as(scores)
    return newest | top_mask(scores, older, heavy[:, None].expand(scores.shape[:2]))


class HeavyHitters:
    """The H2O state of one attention layer: what each cache entry has received so far."""

    def __init__(self, policy: H2O):
        self.policy = policy
        self.scores: Tensor | None = None
        self.heavy = self.recent = torch.empty(0)

    def fresh(self) -> HeavyHitters:
        """The same before any prompt."""
        return HeavyHitters(self.policy)

    def observe(self, received: Tensor, valid: Tensor) -> tuple[Tensor, Tensor]:
        """Account for the attention of new queries, then evict.

        The first call is the prompt and sets the budgets; later calls see the cache as the last
        one left it, with new entries appended.

        Takes what `attention_received` returns, and `valid` keys, shape (batch, keys), bool.
        Returns what to gather from keys and values, each head in its order, padded on the left:
        shape (batch, kv_heads, left), int64; and which of it is valid, shape (batch, left), bool.
        """
        if self.scores is None:
            budgets = [self.policy.budgets(n) for n in valid.sum(1).tolist()]
            self.heavy, self.recent = torch.tensor(budgets, device=valid.device).unbind(1)
            scores = received
        else:
            scores = received.clone()
            scores[..., : self.scores.shape[-1]] += self.scores
        index, left = pack(heavy_and_recent(scores, valid, self.heavy, self.recent), "left")
        self.scores = scores.gather(-1, index)
        return index, left[:, 0]

    def reorder(self, samples: Tensor) -> None:
        """Follow a beam search that replaced the batch by these samples, shape (batch,), int64."""
        if self.scores is not None:
            self.scores = self.scores[samples]
            self.heavy, self.recent = self.heavy[samples], self.recent[samples]

    def repeat(self, repeats: int) -> None:
        """Every sample becomes `repeats` samples, one after the other."""
        samples = torch.arange(len(self.heavy), device=self.heavy.device)
        self.reorder(samples.repeat_interleave(repeats))

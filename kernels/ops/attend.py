"""Attention of surviving heads where stock code keeps them: (batch, heads, tokens, head_dim).

Stock code rotates queries and keys and updates its KV cache before it. Operands are read as they
lie, by strides, with any mask that transformers makes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from typing_extensions import override

from planner.kernels.ops.op import Gradients, Op
from planner.kernels.survivors import Part, Survivors


@dataclass(frozen=True, eq=False)
class Attend(Op, name="attend"):
    """``softmax(scale * q k^T + mask) v``. Differentiable in query, key and value, not in mask.

    Gives (batch, tokens, heads, value_dim), packed by slot: heads beyond a plan's count are
    undefined. Values that are not as wide as keys go through PyTorch in any case.
    """

    query: Tensor  # (batch, heads, tokens, head_dim)
    key: Tensor  # (batch, kv_heads, keys, head_dim), heads a multiple of kv_heads
    value: Tensor  # (batch, kv_heads, keys, value_dim)
    # Bool (True is seen) or added to the scores, broadcast to (batch, heads, tokens, keys). A query
    # that sees nothing gets 0.
    mask: Tensor | None
    # Surviving units of heads, of `slots` in all, which divide kv_heads; one plan, or one per
    # sample.
    survivors: Survivors
    scale: float  # factor on q k^T
    # Token i sees keys 0 to i; as in ``F.scaled_dot_product_attention``, without a mask.
    causal: bool = False

    @override
    def twin(self) -> Tensor:
        width, shared = self.query.shape[1] // self.survivors.slots, self._shared
        key, value = (x.repeat_interleave(shared, dim=1) for x in (self.key, self.value))
        share = self._softmax(self.query @ key.mT, self.mask)
        mixed = (share @ value).transpose(1, 2)
        out = torch.full_like(mixed, torch.nan)
        for sample in range(len(out)):
            units = self.survivors.features(self.survivors.plan_of(sample))
            heads = (units[:, None] * width + torch.arange(width)).flatten()
            out[sample, :, : len(heads)] = mixed[sample, :, heads]
        return out

    @override
    def by_pytorch(self) -> Tensor:
        out = torch.zeros_like(self.empty())
        for samples, plan in self.survivors.groups():
            mask, first = self.mask, 0
            if len(self.survivors.runs(plan)) > 1 and mask is not None and mask.dtype == torch.bool:
                # Attention would turn it into this once for every run.
                mask = torch.zeros_like(mask, dtype=out.dtype).masked_fill_(~mask, -torch.inf)
            for heads, (q, k, v) in self._runs(samples, plan):
                got = F.scaled_dot_product_attention(
                    q,
                    k,
                    v,
                    _mask_of(mask, samples, heads),
                    is_causal=self.causal,
                    scale=self.scale,
                    enable_gqa=q.shape[1] != k.shape[1],
                )
                out[samples, :, first : first + q.shape[1]] = got.transpose(1, 2)
                first += q.shape[1]
        return out

    @override
    def suits_triton(self) -> bool:
        return super().suits_triton() and self.value.shape[-1] == self.query.shape[-1]

    @override
    def empty(self) -> Tensor:
        batch, heads, tokens, _ = self.query.shape
        return self.query.new_empty(batch, tokens, heads, self.value.shape[-1])

    @override
    def gradients(self, gradient: Tensor, wanted: list[str]) -> Gradients:
        sums = {n: torch.zeros_like(getattr(self, n)) for n in ("query", "key", "value")}
        shared = self._shared
        for samples, plan in self.survivors.groups():
            first = 0
            for heads, (q, k, v) in self._runs(samples, plan):
                k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
                weight = self._softmax(q @ k.mT, _mask_of(self.mask, samples, heads)).to(q.dtype)
                d = gradient[samples, :, first : first + q.shape[1]].transpose(1, 2)
                first += q.shape[1]
                d_weight = d @ v.mT
                d_scores = weight * (d_weight - (d_weight * weight).sum(dim=-1, keepdim=True))
                d_scores = d_scores * self.scale
                sums["query"][samples, heads] += d_scores @ k
                kv_heads = slice(heads.start // shared, heads.stop // shared)
                for name, part in (("key", d_scores.mT @ q), ("value", weight.mT @ d)):
                    sums[name][samples, kv_heads] += part.unflatten(1, (-1, shared)).sum(dim=2)
        return {name: sums[name] for name in wanted}

    @property
    def _shared(self) -> int:
        """Query heads to a KV head."""
        return self.query.shape[1] // self.key.shape[1]

    def _runs(self, samples: Part, plan: int) -> Iterator[tuple[slice, list[Tensor]]]:
        """(query heads, operands of these) for each run of a plan's units."""
        width, shared = self.query.shape[1] // self.survivors.slots, self._shared
        for start, stop in self.survivors.runs(plan):
            heads = slice(start * width, stop * width)
            kv_heads = slice(heads.start // shared, heads.stop // shared)
            key, value = self.key[samples, kv_heads], self.value[samples, kv_heads]
            yield heads, [self.query[samples, heads], key, value]

    def _softmax(self, products: Tensor, mask: Tensor | None) -> Tensor:
        """Weights of attention in at least float32; of a row that sees nothing they are 0."""
        scores = (products.float() if products.dtype.itemsize == 2 else products) * self.scale
        if self.causal:
            mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        if mask is not None and mask.dtype == torch.bool:
            scores = scores.masked_fill(~mask, -torch.inf)
        elif mask is not None:
            scores = scores + mask
        return torch.softmax(scores, dim=-1).nan_to_num(0.0)


def _mask_of(mask: Tensor | None, samples: Part, heads: slice) -> Tensor | None:
    """A mask's part for some samples and heads; a single row serves all."""
    if mask is None or mask.ndim < 4:
        return mask
    mask = mask[samples] if mask.shape[0] > 1 else mask
    return mask[:, heads] if mask.shape[1] > 1 else mask

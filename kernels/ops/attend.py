"""Attention of surviving heads where stock code keeps them: (batch, heads, tokens, head_dim).

A model's own code rotates queries and keys and updates its KV cache between projections and
attention. Queries, keys and values are therefore read as they lie, by strides, with any mask that
transformers makes; heads that do not survive are never read.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from planner.ir.intervals import Intervals
from planner.kernels.ops.registration import Gradients, Op
from planner.kernels.ops.slices import Part, plans_of
from planner.kernels.survivors import Survivors

__all__ = ["attend", "naive_attend", "op"]


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    survivors: Survivors,
    *,
    scale: float,
    causal: bool = False,
    triton: bool,
) -> Tensor:
    """``softmax(scale * q k^T + mask) v``. Differentiable in query, key and value, not in mask.

    Args:
        query: (batch, heads, tokens, head_dim).
        key: (batch, kv_heads, keys, head_dim), heads a multiple of kv_heads.
        value: (batch, kv_heads, keys, value_dim).
        mask: bool (True is seen) or added to the scores, broadcast to (batch, heads, tokens, keys).
            A query that sees nothing gets 0.
        survivors: surviving units of heads, of `slots` in all, which divide kv_heads; one plan, or
            one per sample.
        scale: factor on q k^T.
        causal: token i sees keys 0 to i; as in ``F.scaled_dot_product_attention``, without a mask.
        triton: whether Triton computes it, or PyTorch. Values that are not as wide as keys go
            through PyTorch.

    Returns:
        (batch, tokens, heads, value_dim), packed by slot: heads beyond a plan's count are
        undefined.

    Raises:
        InputError: neither one plan nor as many as samples, or shapes that do not fit.
    """
    return op(query, key, value, mask, scale, causal, survivors, triton=triton)


def naive_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    survivors: Survivors,
) -> Tensor:
    """The twin: every head by itself, then packed."""
    shared = query.shape[1] // key.shape[1]
    every_key, every_value = (x.repeat_interleave(shared, dim=1) for x in (key, value))
    scores = query @ every_key.mT * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if mask is not None:
        scores = (
            scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
        )
    mixed = (torch.softmax(scores, dim=-1).nan_to_num(0.0) @ every_value).transpose(1, 2)
    out = torch.full_like(mixed, torch.nan)
    width = query.shape[1] // survivors.slots
    for sample in range(len(query)):
        units = survivors.features(sample if survivors.plans > 1 else 0)
        heads = (units[:, None] * width + torch.arange(width)).flatten()
        out[sample, :, : len(heads)] = mixed[sample, :, heads]
    return out


def _sliced(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    survivors: Survivors,
) -> Tensor:
    batch, count, tokens, _ = query.shape
    out = query.new_zeros(batch, tokens, count, value.shape[-1])
    for samples, plan in plans_of(survivors):
        runs = survivors.runs(plan)
        if len(runs) > 1 and mask is not None and mask.dtype == torch.bool:
            # Attention would turn it into this once for every run.
            mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill_(~mask, -torch.inf)
        first = 0
        for heads, kv_heads in _heads_of(runs, query, key, survivors.slots):
            q, k, v = query[samples, heads], key[samples, kv_heads], value[samples, kv_heads]
            m = _mask_of(mask, samples, heads)
            shared = q.shape[1] != k.shape[1]
            got = F.scaled_dot_product_attention(
                q, k, v, m, is_causal=causal, scale=scale, enable_gqa=shared
            )
            out[samples, :, first : first + q.shape[1]] = got.transpose(1, 2)
            first += q.shape[1]
    return out


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    survivors: Survivors,
    triton: bool,
) -> Tensor:
    if not triton or value.shape[-1] != query.shape[-1]:
        return _sliced(query, key, value, mask, scale, causal, survivors)
    from planner.kernels.triton.attend import attend as kernel

    return kernel(query, key, value, mask, scale, causal, survivors)


def _fake(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    batch, heads, tokens, _ = query.shape
    return query.new_empty(batch, tokens, heads, value.shape[-1])


def _backward(
    gradient: Tensor,
    wanted: list[str],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    causal: bool,
    survivors: Survivors,
) -> Gradients:
    sums = {"query": query, "key": key, "value": value}
    sums = {name: torch.zeros_like(tensor) for name, tensor in sums.items()}
    for samples, plan in plans_of(survivors):
        runs = survivors.runs(plan)
        first = 0
        for heads, kv_heads in _heads_of(runs, query, key, survivors.slots):
            q, k, v = query[samples, heads], key[samples, kv_heads], value[samples, kv_heads]
            shared = q.shape[1] // k.shape[1]
            k, v = (x.repeat_interleave(shared, dim=1) for x in (k, v))
            weight = _softmax(q @ k.mT, _mask_of(mask, samples, heads), scale, causal).to(q.dtype)
            d = gradient[samples, :, first : first + q.shape[1]].transpose(1, 2)
            first += q.shape[1]
            d_weight = d @ v.mT
            d_scores = weight * (d_weight - (d_weight * weight).sum(dim=-1, keepdim=True)) * scale
            sums["query"][samples, heads] += d_scores @ k
            for name, part in (("key", d_scores.mT @ q), ("value", weight.mT @ d)):
                sums[name][samples, kv_heads] += part.unflatten(1, (-1, shared)).sum(dim=2)
    return {name: sums[name] for name in wanted}


def _softmax(products: Tensor, mask: Tensor | None, scale: float, causal: bool) -> Tensor:
    """Weights of attention in at least float32; of a row that sees nothing they are 0."""
    scores = (products.float() if products.dtype.itemsize == 2 else products) * scale
    if causal:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, -torch.inf)
    elif mask is not None:
        scores = scores + mask
    return torch.softmax(scores, dim=-1).nan_to_num(0.0)


def _heads_of(
    runs: Intervals, query: Tensor, key: Tensor, slots: int
) -> Iterator[tuple[slice, slice]]:
    """The query heads and the KV heads of each run of units."""
    widths = [operand.shape[1] // slots for operand in (query, key)]
    for start, stop in runs:
        heads, kv_heads = (slice(start * width, stop * width) for width in widths)
        yield heads, kv_heads


def _mask_of(mask: Tensor | None, samples: Part, heads: slice) -> Tensor | None:
    """A mask's part for some samples and heads; a single row serves all."""
    if mask is None or mask.ndim < 4:
        return mask
    mask = mask[samples] if mask.shape[0] > 1 else mask
    return mask[:, heads] if mask.shape[1] > 1 else mask


op = Op(
    "attend",
    "Tensor query, Tensor key, Tensor value, Tensor? mask, float scale, bool causal",
    forward=_forward,
    fake=_fake,
    backward=_backward,
)
